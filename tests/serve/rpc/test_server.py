import asyncio
import io
import json
import socket
import subprocess

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2

from coat_deploy.errors import ServerError
from coat_deploy.serve.access_log import AccessLog
from coat_deploy.serve.metrics import Metrics
from coat_deploy.serve.options import ListenOptions
from coat_deploy.serve.rpc.server import start_grpc

NAME = "coat_lite_toy"
SERVICE = "/inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"
TOKEN = "correct-horse-battery"
WAIT_S = 30


def content(name=NAME, images=1):
    found = service_pb2.ModelInferRequest(model_name=name)
    found.inputs.add(name="pixels", datatype="FP32", shape=(images, 3, 64, 64))
    found.raw_input_contents.append(np.ones((images, 3, 64, 64), np.float32).tobytes())
    return found.SerializeToString()


def code(calling, *call, **how):
    try:
        calling(*call, **how)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (None, "UNAUTHENTICATED"),
        ("Bearer wrong-horse-battery", "UNAUTHENTICATED"),
        (f"Basic {TOKEN}", "UNAUTHENTICATED"),
        (f"Bearer {TOKEN}", "OK"),
    ],
)
def test_only_who_shows_the_token_is_let_in(listening, calling, shown, expected):
    address = listening({"token": TOKEN}).address
    metadata = [("authorization", shown)] if shown else None
    for path, message in ((INFER, content()), (f"{SERVICE}/ServerMetadata", b"")):
        assert code(calling, address, path, message, metadata=metadata) == expected


def test_whether_the_server_is_well_is_told_without_a_token(listening, calling):
    address = listening({"token": TOKEN}).address
    assert code(calling, address, f"{SERVICE}/ServerReady") == "OK"
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status == 1
        reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        with pytest.raises(grpc.RpcError) as error:
            list(channel.stream_stream(reflection)(iter([b""]), timeout=WAIT_S))
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture
def pair(tmp_path):
    """A certificate for localhost, and its key."""
    paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-out", paths[0], "-keyout", paths[1]],
        check=True, capture_output=True, timeout=WAIT_S,
    )  # fmt: skip
    return paths


def test_it_speaks_tls(listening, pair):
    certificate, key = pair
    server = listening({"certificate": certificate, "key": key, "host": "localhost"})
    with triton.InferenceServerClient(
        server.address, ssl=True, root_certificates=str(certificate)
    ) as client:
        assert client.is_server_ready()
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(f"{SERVICE}/ServerLive")(b"", timeout=WAIT_S)


def refused(service, **listen):
    with pytest.raises(ServerError) as error:
        asyncio.run(start_grpc(service, ListenOptions(**listen)))
    return str(error.value)


def test_a_server_that_cannot_start_says_why(serving, tmp_path):
    service = serving()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(service, grpc_port=port)
        assert message.startswith(f"127.0.0.1:{port}: ") and "--grpc-port" in message
    assert "no.such.host.invalid:0: " in refused(service, grpc_port=0, host="no.such.host.invalid")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    assert "not a certificate" in refused(service, grpc_port=0, certificate=nonsense, key=nonsense)


def test_every_call_is_logged_and_counted(listening, calling):
    text, metrics = io.StringIO(), Metrics()
    log = AccessLog(text)
    server = listening(how={"metrics": metrics, "log": log})
    mine = [("x-request-id", "mine-1")]
    with grpc.insecure_channel(server.address) as channel:
        _, call = channel.unary_unary(INFER).with_call(content(), timeout=WAIT_S, metadata=mine)
    assert ("x-request-id", "mine-1") in [tuple(item) for item in call.trailing_metadata()]
    assert code(calling, server.address, INFER, content("no_such")) == "NOT_FOUND"
    server.run(server.server.stop(WAIT_S))
    log.close()
    first, second = map(json.loads, text.getvalue().splitlines())
    assert first["request_id"] == "mine-1" and len(second["request_id"]) == 32
    assert (first["method"], first["path"], first["client"]) == ("gRPC", INFER, "127.0.0.1")
    assert (first["status"], second["status"]) == ("OK", "NOT_FOUND")
    assert first["bytes_in"] == len(content()) and first["bytes_out"] > 20 and first["ms"] > 0
    exposed = metrics.text().decode()
    assert 'coat_grpc_responses_total{status="OK"} 1.0' in exposed
    assert 'coat_grpc_responses_total{status="NOT_FOUND"} 1.0' in exposed
    assert "coat_in_flight_requests 0.0" in exposed


def test_a_server_that_ends_answers_every_call_it_took(listening):
    server = listening()
    lane = server.service.registry.get(NAME).lane
    for _ in range(lane.levels.streams):
        lane.turn.acquire()
    with grpc.insecure_channel(server.address) as channel:
        method = channel.unary_unary(INFER)
        calls = [method.future(content(), timeout=WAIT_S) for _ in range(20)]
        waiting = 20 - lane.levels.streams
        server.run(_until(lambda: len(lane.waiting) == waiting))
        ended = server.begin(server.server.stop(WAIT_S))
        server.run(_until(lambda: code_now(method) == "UNAVAILABLE"))
        assert not ended.done()
        lane.turn.release(lane.levels.streams)
        assert [call.code() for call in calls] == [grpc.StatusCode.OK] * 20
        ended.result(WAIT_S)


def code_now(method):
    """What becomes of a call that comes late; it is not let in, so it does not wait."""
    call = method.future(content(), timeout=0.5)
    return call.code().name


async def _until(condition):
    async with asyncio.timeout(WAIT_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.002)


def test_what_takes_longer_than_the_grace_is_cancelled(listening):
    server = listening()
    lane = server.service.registry.get(NAME).lane
    for _ in range(lane.levels.streams):
        lane.turn.acquire()
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(INFER).future(content(), timeout=WAIT_S)
        server.run(_until(lambda: lane.running == 1))
        server.run(server.server.stop(0.05))
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    lane.turn.release(lane.levels.streams)
