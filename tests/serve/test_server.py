"""The server as a process: its sockets, its signals, and clients that misbehave."""

import json
import re
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from coat_deploy.errors import ServerError
from coat_deploy.serve.options import ListenOptions
from coat_deploy.serve.server import check_certificate

NAME = "coat_lite_toy"
PIXELS = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
RAW = {"Inference-Header-Content-Length": "0"}


def infer(server, images=1):
    content = np.concatenate([PIXELS] * images).tobytes()
    return server.ask("POST", f"/v2/models/{NAME}/infer", content, **RAW)


def received(connection):
    """All that the server sends until it closes the connection."""
    content = b""
    while part := connection.recv(65536):
        content += part
    return content


def test_it_serves_and_ends_without_an_error(running, jpeg):
    server = running()
    assert server.ask("GET", "/v2/health/ready")[0] == 200
    status, content, _ = server.ask("POST", f"/models/{NAME}", jpeg)
    assert status == 200 and len(json.loads(content)) == 5
    status, said = server.end()
    assert status == 0 and "Traceback" not in said
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/v2/health/ready", 200),
        (f"/models/{NAME}", 200),
    ]


def test_every_accepted_request_is_answered_through_sigterm(running):
    server = running("--no-access-log")
    sent, stop = threading.Event(), threading.Event()
    answers = []

    def client():
        while not stop.is_set():
            try:
                connection = server.connect()
            except ConnectionRefusedError:  # it no longer listens
                return
            with connection:
                content = PIXELS.tobytes()
                head = (
                    f"POST /v2/models/{NAME}/infer HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
                    f"inference-header-content-length: 0\r\ncontent-length: {len(content)}\r\n\r\n"
                )
                connection.sendall(head.encode() + content)
                sent.set()
                answers.append(received(connection)[:12])

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client) for _ in range(8)]
        assert sent.wait(30)
        time.sleep(0.3)
        server.process.terminate()
        assert server.process.wait(60) == 0
        stop.set()
    for each in clients:
        each.result()
    assert len(answers) >= 8 and set(answers) == {b"HTTP/1.1 200"}


def under_way(server):
    """How many requests the server is answering, this one among them."""
    text = server.ask("GET", "/metrics")[1].decode()
    return int(float(re.search(r"^coat_in_flight_requests (.*)$", text, re.MULTILINE)[1]))


def test_what_is_computed_when_the_end_begins_is_answered(running):
    server = running("--no-access-log", "--max-batch", "512")
    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            asked = [pool.submit(infer, server, 500) for _ in range(3)]
            while (found := under_way(server)) < 4 and not all(each.done() for each in asked):
                time.sleep(0.005)
            if found == 4:
                break
        server.process.terminate()
        assert [each.result()[0] for each in asked] == [200] * 3
    assert server.process.wait(60) == 0


def test_who_is_about_to_ask_when_the_end_begins_is_heard(running):
    server = running("--no-access-log")
    with server.connect() as asking, server.connect() as late:
        asking.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n")
        server.process.terminate()
        time.sleep(0.5)
        asking.sendall(b"\r\n")
        late.sendall(b"GET /v2/health/ready HTTP/1.1\r\nhost: a\r\n\r\n")
        assert received(asking).startswith(b"HTTP/1.1 200")
        assert received(late).startswith(b"HTTP/1.1 503")  # alive, and not ready
    assert server.process.wait(60) == 0


def test_a_full_queue_answers_at_once(running):
    server = running("--no-access-log", "--max-queue", "2", "--max-batch", "512")

    def ask():
        begin = time.monotonic()
        status, content, headers = infer(server, 300)
        return status, headers.get("retry-after"), time.monotonic() - begin, content

    with ThreadPoolExecutor(24) as pool:
        answers = [future.result() for future in [pool.submit(ask) for _ in range(24)]]
    answered = [answer for answer in answers if answer[0] == 200]
    refused = [answer for answer in answers if answer[0] == 503]
    assert len(answered) + len(refused) == 24 and len(answered) >= 3 and refused
    assert all(int(retry) >= 1 and b"queue is full" in text for _, retry, _, text in refused)
    assert min(answer[2] for answer in refused) < max(answer[2] for answer in answered)


def test_a_body_that_does_not_come_is_waited_for_only_so_long(running):
    server = running("--deadline", "0.3")
    with server.connect() as connection:
        connection.sendall(
            f"POST /models/{NAME} HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nabc".encode()
        )
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408") and b"did not come in 0.3 s" in answer
    assert server.ask("GET", "/v2/health/ready")[0] == 200


def test_clients_that_go_leave_nothing_behind(running):
    server = running("--no-access-log")
    content = PIXELS.tobytes()
    head = (
        f"POST /v2/models/{NAME}/infer HTTP/1.1\r\nhost: a\r\ninference-header-content-length: 0"
        f"\r\ncontent-length: {len(content)}\r\n\r\n"
    ).encode()
    for sent in (b"", head[:20], head, head + content[:1000], head + content):
        for _ in range(5):
            with server.connect() as connection:
                connection.sendall(sent)
    status, _, _ = infer(server)
    assert status == 200
    deadline = time.monotonic() + 30
    while under_way(server) > 1:
        assert time.monotonic() < deadline, "requests of clients that are gone are kept"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"rubbish\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 100_000, b"431"),
        (b"POST /v2 HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00", b"400"),
    ],
)
def test_what_is_no_http_is_told_in_json(running, sent, status):
    server = running()
    with server.connect() as connection:
        connection.sendall(sent)
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.split()[1] == status and list(json.loads(body)) == ["error"]
    assert server.ask("GET", "/v2/health/live")[0] == 200


def test_what_follows_a_whole_request_does_not_cost_its_answer(running, jpeg):
    server = running()
    head = f"POST /models/{NAME} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(jpeg)}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + jpeg + b"rubbish\r\n\r\n")
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_a_body_in_broken_chunks_is_told(running):
    server = running()
    head = f"POST /models/{NAME} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + b"3\r\nabc\r\nrubbish\r\n")
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
    assert under_way(server) == 1


def test_several_processes_share_a_port_and_their_metrics(running, jpeg):
    server = running("--workers", "2", "--no-access-log")
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, "POST", f"/models/{NAME}", jpeg) for _ in range(40)]
        assert [each.result()[0] for each in asked] == [200] * 40
    # The process that is asked may not be the one that has just answered, and counts after it.
    wanted = 'coat_requests_total{model="coat_lite_toy",outcome="ok"} 40.0'
    deadline = time.monotonic() + 10
    while wanted not in (text := server.ask("GET", "/metrics")[1].decode()):
        assert time.monotonic() < deadline, text
    status, said = server.end()
    assert status == 0 and "Traceback" not in said


def test_processes_end_with_the_one_that_started_them(running):
    server = running("--workers", "2", "--no-access-log")
    server.process.kill()
    deadline = time.monotonic() + 60
    while True:
        try:
            server.connect().close()
        except ConnectionError:
            return
        assert time.monotonic() < deadline, "the port is still taken"
        time.sleep(0.05)


def test_more_processes_than_threads_are_refused(exported, running):
    with pytest.raises(AssertionError, match="each needs a thread"):
        running("--workers", "3")


@pytest.fixture
def certificate(tmp_path):
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-out", str(paths[0]), "-keyout", str(paths[1])]
    try:
        subprocess.run([*words, *names, *made], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    return paths


def test_tls(running, certificate, jpeg):
    server = running("--tls-cert", certificate[0], "--tls-key", certificate[1])
    context = ssl.create_default_context(cafile=certificate[0])
    with context.wrap_socket(server.connect(), server_hostname="127.0.0.1") as connection:
        connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.1 200")


def test_certificates_that_do_not_fit_are_refused(certificate, tmp_path):
    other = tmp_path / "other.pem"
    for cert, key, words in [
        (certificate[0], None, "needs both a certificate and its key"),
        (certificate[0], other, "no such file"),
        (certificate[1], certificate[0], "not a certificate with the key"),
    ]:
        with pytest.raises(ServerError, match=words):
            check_certificate(ListenOptions(certificate=cert, key=key))


def test_a_changed_model_is_served_without_a_restart(running, models, export_toy):
    server = running("--reload", "0.1", models=models)
    before = infer(server)[1]
    export_toy(models, NAME, 1)
    deadline = time.monotonic() + 60
    while infer(server)[1] == before:
        assert time.monotonic() < deadline, "the old version is still served"
        time.sleep(0.05)
