import io
import json
import re
import threading

import pytest

from coat_deploy.serve.access_log import AccessLog
from coat_deploy.serve.options import Limits

TOKEN = "a-token-that-is-long-enough"
READY = "/v2/health/ready"
MODEL = "/v2/models/coat_toy"


@pytest.mark.parametrize("shown", [None, "", "Bearer", "Bearer x", f"Basic {TOKEN}", TOKEN])
def test_without_the_token_nothing_is_told(http, shared_service, shown):
    client = http(shared_service, token=TOKEN)
    headers = {} if shown is None else {"authorization": shown}
    for path in (MODEL, "/models", "/metrics", "/v2", "/no/such"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401 and "Bearer TOKEN" in answer.json()["error"]
        assert answer.headers["www-authenticate"] == "Bearer"


def test_with_the_token_all_is_open(http, shared_service):
    client = http(shared_service, token=TOKEN)
    for scheme in ("Bearer", "bearer"):
        assert client.get(MODEL, headers={"authorization": f"{scheme} {TOKEN}"}).status_code == 200


def test_health_needs_no_token(http, shared_service):
    client = http(shared_service, token=TOKEN)
    assert client.get(READY).status_code == client.get("/v2/health/live").status_code == 200


def test_a_request_has_an_id(client):
    assert re.fullmatch("[0-9a-f]{32}", client.get(READY).headers["x-request-id"])
    named = client.get(READY, headers={"x-request-id": "trace-7"})
    assert named.headers["x-request-id"] == "trace-7"
    forged = client.get(READY, headers={"x-request-id": "a b" * 100})
    assert re.fullmatch("[0-9a-f]{32}", forged.headers["x-request-id"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/no/such", 404), ("DELETE", MODEL, 405), ("POST", READY, 405), ("GET", "/v3", 404)],
)
def test_routes_that_are_not_there_are_told_in_json(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status and list(answer.json()) == ["error"]


def test_our_own_mistakes_tell_clients_nothing(client, shared_service, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(shared_service, "model_metadata", fail)
    answer = client.get(MODEL)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert "ZeroDivisionError" in caplog.text


def test_requests_are_logged_a_line_each(http, shared_service):
    stream = io.StringIO()
    log = AccessLog(stream)
    client = http(shared_service, log=log)
    client.get(READY, headers={"x-request-id": "one"})
    client.post("/models/no_such%0a", content=b"abc")
    log.close()
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["request_id"], first["method"], first["path"]) == ("one", "GET", READY)
    assert (first["status"], second["status"], second["bytes_in"]) == (200, 404, 3)
    assert first["ms"] > 0 and second["path"] == "/models/no_such\n"


def test_lines_of_the_log_come_soon_and_together(http, shared_service):
    class Stream(io.StringIO):
        written = threading.Event()

        def flush(self):
            self.written.set()

    stream = Stream()
    log = AccessLog(stream)
    client = http(shared_service, log=log)
    for _ in range(3):
        client.get(READY)
    assert stream.written.wait(30)
    log.close()
    assert len(stream.getvalue().splitlines()) == 3


def test_a_reader_of_the_log_that_is_gone_stops_nothing(http, shared_service):
    stream = io.StringIO()
    log = AccessLog(stream)
    client = http(shared_service, log=log)
    stream.close()
    assert client.get(READY).status_code == client.get(READY).status_code == 200
    log.close()


def test_metrics_count_requests_and_steps(http, serving, jpeg):
    client = http(serving())
    client.post("/models/coat_toy", content=jpeg)
    client.post("/models/coat_toy", content=b"rubbish")
    text = client.get("/metrics").text
    assert 'coat_http_responses_total{status="200"} 1.0' in text
    assert 'coat_http_responses_total{status="400"} 1.0' in text
    assert "coat_in_flight_requests 1.0" in text  # this one


def test_an_answer_says_when_the_server_ends(http, serving):
    service = serving()
    client = http(service)
    assert "connection" not in client.get(READY).headers
    service.drain()
    answer = client.get(READY)
    assert (answer.status_code, answer.headers["connection"]) == (503, "close")
    assert client.get("/v2/health/live").status_code == 200


def test_a_full_queue_is_told_before_the_body_is_read(http, serving, monkeypatch):
    service = serving(limits=Limits(queue=1))
    lane = service.registry.get("coat_toy").lane
    lane.waiting.append(object())  # type: ignore[arg-type]
    try:
        client = http(service)
        for path in ("/models/coat_toy", f"{MODEL}/infer"):
            answer = client.post(path, content=b"rubbish")
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert "queue is full" in answer.json()["error"]
    finally:
        lane.waiting.clear()
