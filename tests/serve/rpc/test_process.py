"""`coat-deploy serve` as a process that speaks gRPC beside HTTP."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

ROOT = Path(__file__).resolve().parents[3]
NAME = "coat_lite_toy"
INFER = "/inference.GRPCInferenceService/ModelInfer"
WAIT_S = 60


def content():
    found = service_pb2.ModelInferRequest(model_name=NAME)
    found.inputs.add(name="pixels", datatype="FP32", shape=(1, 3, 64, 64))
    found.raw_input_contents.append(np.ones((1, 3, 64, 64), np.float32).tobytes())
    return found.SerializeToString()


class Process:
    """The command, until it is ready; `address` is that of gRPC."""

    def __init__(self, models, *words):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "cli.py", "serve", "--models", models, "--port", "0",
             "--grpc-port", str(self.port), "--threads", "2", "--no-access-log", *words],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def wait_until_ready(self, times=1):
        for line in self.process.stderr:
            times -= "ready: http" in line
            if not times:
                return
        raise AssertionError("it did not become ready")

    def end(self):
        self.process.terminate()
        return self.join()

    def join(self):
        said = self.process.communicate(timeout=WAIT_S)[1]
        return self.process.returncode, said


@pytest.fixture
def served(exported):
    """Start the command with some words."""
    started = []

    def start(*words, ready=1):
        started.append(Process(exported, *words))
        started[-1].wait_until_ready(ready)
        return started[-1]

    yield start
    for each in started:
        try:
            os.killpg(each.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            each.process.communicate(timeout=WAIT_S)


def test_it_serves_tritons_client_and_ends_without_an_error(served):
    server = served()
    with triton.InferenceServerClient(server.address) as client:
        assert client.is_server_ready()
        tensor = triton.InferInput("pixels", [1, 3, 64, 64], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 3, 64, 64), np.float32))
        assert client.infer(NAME, [tensor]).as_numpy("logits").shape == (1, 5)
    assert server.end() == (0, "")


@pytest.mark.slow
def test_several_processes_share_the_port(served):
    server = served("--workers", "2", ready=2)
    for _ in range(6):
        with grpc.insecure_channel(server.address) as channel:
            assert channel.unary_unary(INFER)(content(), timeout=WAIT_S)
    status, said = server.end()
    assert status == 0 and "Traceback" not in said


def test_every_call_that_was_taken_is_answered_through_sigterm(served):
    server = served()
    codes, begun = [], threading.Event()

    def ask():
        with grpc.insecure_channel(server.address) as channel:
            method = channel.unary_unary(INFER)
            code = grpc.StatusCode.OK
            while code == grpc.StatusCode.OK:
                code = method.future(content(), timeout=WAIT_S).code()
                codes.append(code)
                begun.set()

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    assert begun.wait(WAIT_S)
    time.sleep(0.3)
    status, said = server.end()
    for client in clients:
        client.join(WAIT_S)
    # One refusal a client, when the server takes no more; no call was cut off.
    assert status == 0 and "Traceback" not in said
    assert codes.count(grpc.StatusCode.UNAVAILABLE) == len(clients)
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


def test_open_streams_do_not_keep_it(served):
    server = served("--drain", "60")
    with grpc.insecure_channel(server.address) as channel:
        never = threading.Event()

        def messages():
            yield content()
            never.wait(WAIT_S)

        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        replies = stream(messages(), timeout=WAIT_S)
        next(replies)
        begin = time.monotonic()
        status, _ = server.end()
        assert status == 0 and time.monotonic() - begin < 30
        never.set()


def test_a_port_that_is_taken_is_told_in_a_line(exported):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, ROOT / "cli.py", "serve", "--models", exported, "--port", "0",
             "--grpc-port", str(port)],
            capture_output=True, text=True, timeout=WAIT_S,
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}: gRPC cannot listen there" in done.stderr
