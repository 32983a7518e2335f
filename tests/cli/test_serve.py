import socket

import pytest

from coat_deploy.serve import server


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (("no_such",), 2, "unknown model 'no_such'"),
        (("coat_toy", "coat_toy"), 2, "model coat_toy: is named twice"),
        (("coat_toy", "--target", "onnxruntim"), 2, "Did you mean 'onnxruntime'?"),
        (("coat_toy", "--target", "eager"), 2, "target eager: is not served"),
        (("--target", "eager"), 2, "target eager: is not served"),
        (("coat_toy", "--precision", "int8"), 1, "Run: coat-deploy export coat_toy"),
        (("--token-file", "none"), 1, "none: the token cannot be read"),
        (("--tls-cert", "none"), 1, "TLS: needs both a certificate and its key"),
        (("--workers", "2", "--threads", "2", "--allow-load"), 2, "--allow-load: a client's"),
        (("--workers", "9", "--threads", "2"), 2, "--workers: each needs a thread"),
        (("--host", "192.0.2.1"), 1, "192.0.2.1:0: cannot listen there"),
        (("--max-queue", "0"), 2, "--max-queue"),
    ],
)
def test_what_cannot_be_served_is_one_line(cli, exported, words, status, error):
    ran = cli("serve", *words, "--models", exported, "--port", "0", "--grpc-port", "0")
    assert (ran.status, ran.out) == (status, "")
    assert error in ran.err and ran.err.count("\n") == 1


def test_a_port_that_is_taken_is_told_before_models_are_loaded(cli, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = cli("serve", "--models", tmp_path, "--port", port, "--grpc-port", "0")
    assert ran.status == 1 and "cannot listen there" in ran.err


def test_options_reach_the_server(cli, exported, monkeypatch):
    found = []
    monkeypatch.setattr(server, "serve", lambda *arguments: found.append(arguments))
    monkeypatch.setenv("COAT_TOKEN", "a-token-of-some-length")
    words = ("--max-body", "1", "--max-pixels", "2", "--deadline", "0.5", "--max-batch", "3")
    more = ("--precision", "fp32", "--batch", "4", "--allow-load", "--no-access-log")
    ran = cli(
        "serve", "coat_toy", *words, *more, "--models", exported, "--port", "0", "--grpc-port", "0"
    )
    assert ran.status == 0
    ((options, listen, _, _),) = found
    assert (options.names, options.precision, options.batch) == (("coat_toy",), "fp32", 4)
    limits = options.limits
    assert (limits.body_bytes, limits.images.max_pixels) == (1 << 20, 2_000_000)
    assert (limits.deadline_s, limits.batch, options.allow_load) == (0.5, 3, True)
    assert (listen.token, listen.access_log) == ("a-token-of-some-length", False)


def test_an_address_for_all_without_a_token_is_told(cli, exported, monkeypatch):
    monkeypatch.setattr(server, "serve", lambda *arguments: None)
    monkeypatch.delenv("COAT_TOKEN", raising=False)
    ran = cli("serve", "--host", "0.0.0.0", "--port", "0", "--models", exported)
    assert ran.status == 0 and "no token is set" in ran.err
