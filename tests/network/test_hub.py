import dataclasses
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from coat_deploy.errors import DownloadError
from coat_deploy.network.download import DownloadOptions
from coat_deploy.network.hub import fetch_hub

pytest.importorskip("huggingface_hub")

REPOSITORY = "timm/coat_toy.in1k"
DATA = bytes(range(256)) * 512
DIGEST = hashlib.sha256(DATA).hexdigest()


class Hub(ThreadingHTTPServer):
    """The little of the Hugging Face Hub that one file takes."""

    daemon_threads = True
    data = DATA
    status = 200

    def __init__(self):
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.server.asked.append(f"{self.command} {self.path}")
        self.send_response(self.server.status)
        self.send_header("ETag", f'"{DIGEST}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.server.data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join(timeout=5)


@pytest.fixture
def options(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return DownloadOptions(
        tmp_path / "cache", hub_endpoint=hub.url, hub_cache_dir=tmp_path / "hub", timeout_s=2
    )


def fails(options, match):
    with pytest.raises(DownloadError, match=match) as caught:
        fetch_hub(REPOSITORY, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_fetched_verified_and_cached(hub, options, capfd):
    result = fetch_hub(REPOSITORY, options)
    assert result.path.read_bytes() == DATA
    assert result.sha256 == DIGEST
    assert result.url == f"{hub.url}/{REPOSITORY}/resolve/main/model.safetensors"
    fetch_hub(REPOSITORY, options)
    assert sum(line.startswith("GET") for line in hub.asked) == 1
    assert capfd.readouterr() == ("", "")


def test_progress_counts_up_to_the_whole_file(options):
    calls = []
    options = dataclasses.replace(options, progress=lambda *call: calls.append(call))
    fetch_hub(REPOSITORY, options)
    assert calls[-1] == (REPOSITORY, len(DATA), len(DATA))


def test_a_cached_file_serves_offline(hub, options):
    fetch_hub(REPOSITORY, options)
    asked = len(hub.asked)
    assert fetch_hub(REPOSITORY, dataclasses.replace(options, offline=True)).sha256 == DIGEST
    assert len(hub.asked) == asked


def test_a_damaged_cached_file_is_fetched_again(hub, options):
    fetch_hub(REPOSITORY, options).path.resolve().write_bytes(DATA[:-1] + b"!")
    assert fetch_hub(REPOSITORY, options).path.read_bytes() == DATA


def test_a_damaged_cached_file_offline_shows_both_hashes(options):
    damaged = DATA[:-1] + b"!"
    fetch_hub(REPOSITORY, options).path.resolve().write_bytes(damaged)
    message = fails(dataclasses.replace(options, offline=True), "damaged file")
    assert hashlib.sha256(damaged).hexdigest() in message
    assert DIGEST in message


def test_a_hub_that_sends_other_bytes_than_it_states_is_refused(hub, options):
    hub.data = DATA[:-1] + b"!"
    assert f"expected {DIGEST}" in fails(options, "damaged file")


def test_a_refused_connection_says_what_to_fetch_and_where_to_put_it(options):
    with Hub() as gone:
        url = gone.url
    message = fails(dataclasses.replace(options, hub_endpoint=url), "[Rr]efused")
    assert f"Fetch {url}/{REPOSITORY}/resolve/main/model.safetensors" in message
    assert f"save it as {options.cache_dir / REPOSITORY}.safetensors" in message


@pytest.mark.parametrize("status", [401, 404, 500])
def test_http_errors_are_one_line(hub, options, status):
    hub.status = status
    assert "--weights PATH" in fails(options, str(status))


def test_offline_asks_no_server(hub, options):
    fails(dataclasses.replace(options, offline=True), r"\(offline\)")
    assert hub.asked == []


def test_a_file_put_where_the_message_says_is_taken(hub, options):
    placed = options.cache_dir / "timm" / "coat_toy.in1k.safetensors"
    placed.parent.mkdir(parents=True)
    placed.write_bytes(DATA)
    assert fetch_hub(REPOSITORY, options).path == placed
    assert hub.asked == []
