"""Measure what serving costs over the bare artifact, in one run.

    coat-deploy export coat_lite_tiny --weights random:0 --models /tmp/models
    python docs/benchmarks/serving.py --models /tmp/models --threads 2

The server is a process of its own, as `coat-deploy serve` starts it; the artifact alone is run in
this one. They take turns, in rounds of shuffled order, so that what slows the machine slows both:

- start: from the command to the first answer.
- one client: what a request takes beyond the artifact on all threads, a JPEG beyond decoding and
  the artifact: the median of differences within rounds, each of the medians of a turn. In several
  sittings, of a new server and a session opened anew: where memory happens to lie makes the same
  artifact some percent faster or slower. Of two sessions in one process the one that was opened
  last is faster by 1%, so the server and the session here are it in turn.
- many clients: images a second against those of the artifact on a thread each, clients' work and
  all, which is done on the same cores.
- overload: how soon a full queue says so.
"""

import argparse
import base64
import contextlib
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from coat_deploy.images import load
from coat_deploy.machine import describe, usable_threads
from coat_deploy.measure.latency import append_records
from coat_deploy.measure.proof import probe_images
from coat_deploy.model import ArtifactQuery, Model
from coat_deploy.open import Source, default_target, find_source, open_source
from coat_deploy.repository import Repository
from coat_deploy.runner import LoadOptions, Pixels, Runner
from coat_deploy.serve.rpc.messages import InferRequestMessage
from coat_deploy.spec import Preprocess

PHOTO = (375, 500)
JPEG_QUALITY = 90
OK = b"200"
LENGTH = b"content-length: "
GRPC, BESIDE_GRPC = "grpc", "bare, by grpc"
BASES = {
    "binary": "bare",
    GRPC: BESIDE_GRPC,
    "jpeg": "decode + bare",
    "json": "bare",
    "jpeg in json": "decode + bare",
}
"""What the requests of one client are compared with."""

Step = Callable[[], bytes]
"""One request, or one run of the artifact; returns an HTTP status, or `OK`."""

Times = defaultdict[str, list[float]]
"""What each step took, in ms."""


@dataclass(frozen=True)
class Inputs:
    """What is asked about: pixels, and a photograph."""

    pixels: Pixels
    jpeg: bytes


class Client:
    """A connection that sends one request again and again."""

    def __init__(self, port: int, path: str, body: bytes, **headers: object) -> None:
        lines = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._request = "\r\n".join([*lines, "", ""]).encode() + body
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __call__(self) -> bytes:
        """Ask, and return the status."""
        self._socket.sendall(self._request)
        received = self._more()
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._more()
        begin = received.index(LENGTH, 0, end) + len(LENGTH)
        left = int(received[begin : received.index(b"\r", begin)]) - (len(received) - end - 4)
        while left > 0:
            left -= len(self._more())
        return received[9:12]

    def _more(self) -> bytes:
        part = self._socket.recv(1 << 16)
        if not part:
            raise ConnectionError("the server closed the connection")
        return part


@dataclass(frozen=True)
class Server:
    """A server that runs, and how long it took to be ready."""

    port: int
    grpc_port: int
    model: str
    start_s: float
    pid: int

    def ways(self, inputs: Inputs) -> dict[str, Callable[[], Step]]:
        """Return, by name, what makes a client of each way to ask."""
        infer, label = f"/v2/models/{self.model}/infer", f"/models/{self.model}"
        tensor: dict[str, Any] = {
            "name": "pixels",
            "datatype": "FP32",
            "shape": list(inputs.pixels.shape),
        }
        binary = inputs.pixels.tobytes()
        sized = tensor | {"parameters": {"binary_data_size": len(binary)}}
        wanted = {"parameters": {"binary_data_output": True}}
        head = json.dumps({"inputs": [sized]} | wanted).encode()
        text = json.dumps({"inputs": [tensor | {"data": inputs.pixels.ravel().tolist()}]}).encode()
        packed = json.dumps({"inputs": base64.b64encode(inputs.jpeg).decode()}).encode()
        kind = "application/json"
        length = {"inference_header_content_length": len(head)}
        message = infer_message(self.model, inputs.pixels)
        return {
            "binary": lambda: Client(self.port, infer, head + binary, **length),
            GRPC: lambda: grpc_client(self.grpc_port, message),
            "jpeg": lambda: Client(self.port, label, inputs.jpeg, content_type="image/jpeg"),
            "json": lambda: Client(self.port, infer, text, content_type=kind),
            "jpeg in json": lambda: Client(self.port, label, packed, content_type=kind),
        }


def infer_message(model: str, pixels: Pixels) -> bytes:
    """Return the protocol's message that asks a model about pixels, as it goes over the wire."""
    message = InferRequestMessage(model_name=model, raw_input_contents=[pixels.tobytes()])
    message.inputs.add(name="pixels", datatype="FP32", shape=pixels.shape)
    return message.SerializeToString()


def grpc_client(port: int, message: bytes) -> Step:
    """Return a step that asks over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    return lambda: done(call(message, timeout=60))


@contextlib.contextmanager
def running(arguments: argparse.Namespace, *words: str) -> Iterator[Server]:
    """Start a server and wait until it is ready."""
    command = [sys.executable, "-m", "coat_deploy", "serve", arguments.model, "--port", "0"]
    command += ["--models", str(arguments.models), "--threads", str(arguments.threads)]
    if arguments.precision:
        command += ["--precision", arguments.precision]
    if arguments.target:
        command += ["--target", arguments.target]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        grpc_port = free.getsockname()[1]
    command += ["--grpc-port", str(grpc_port)]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "ready: http" in line:
                break
        else:
            raise SystemExit("the server did not start")
        start_s = time.perf_counter() - begin
        # The access log has to be read by someone.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        port = int(line.rsplit(":", 1)[1])
        yield Server(port, grpc_port, arguments.model, start_s, process.pid)
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    """Measure, print, and record if asked."""
    arguments = parse()
    source = find(arguments)
    how = source.model.spec.preprocess.at(source.size)
    inputs = make_inputs(how.input_size)
    whole = LoadOptions(threads=arguments.threads, whole_batches=True)
    shared = LoadOptions(threads=arguments.threads, streams=arguments.threads)
    starts: list[float] = []
    times: Times = defaultdict(list)
    for sitting in range(arguments.sittings):
        with contextlib.ExitStack() as stack:
            if sitting % 2:
                server = stack.enter_context(running(arguments))
            one = stack.enter_context(open_source(source, whole))
            if not sitting % 2:
                server = stack.enter_context(running(arguments))
            starts.append(server.start_s)
            alone, ways = bare(one, inputs, how), server.ways(inputs)
            over_http = {name: make() for name, make in ways.items() if name != GRPC}
            race(alone | over_http, arguments, sitting, times)
            # Last: both ends of a channel keep threads that wake, in the way of whoever is next.
            over_grpc = {BESIDE_GRPC: alone["bare"], GRPC: ways[GRPC]()}
            race(over_grpc, arguments, sitting, times)
    with running(arguments) as server, open_source(source, shared) as many:
        rates = rally(bare(many, inputs, how), server.ways(inputs), arguments)
    result = {
        "kind": "serving",
        "model": arguments.model,
        "artifact": source.artifact and source.artifact.name,
        "sha256": source.sha256,
        "threads": arguments.threads,
        "clients": arguments.clients,
        "sittings": arguments.sittings,
        "rounds": arguments.rounds,
        "turn": arguments.turn,
        "start_s": statistics.median(starts),
        "latency_ms": {
            name: dict(zip(("p50", "p90"), map(float, np.quantile(taken, (0.5, 0.9))), strict=True))
            for name, taken in times.items()
        },
        "adds_ms": {way: added(times, way, arguments.turn) for way in BASES},
        "images_per_s": rates,
        "overload": overload(arguments, inputs),
    }
    report(result)
    if arguments.record:
        document = result | {"machine": describe().to_json()}
        append_records(arguments.record, [json.dumps(document)])


def done(result: object) -> bytes:
    """Return that a step went well, which its result, whatever it is, shows."""
    return OK


def parse() -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coat_lite_tiny")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--target")
    parser.add_argument("--precision")
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--sittings", type=int, default=8, help="servers that are started")
    parser.add_argument("--rounds", type=int, default=15, help="rounds with one client, in each")
    parser.add_argument("--turn", type=int, default=4, help="requests in a row, in a round")
    parser.add_argument("--slices", type=int, default=7, help="rounds with many clients")
    parser.add_argument("--slice-s", type=float, default=3.0, help="seconds of each")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append a line of JSON")
    return parser.parse_args()


def find(arguments: argparse.Namespace) -> Source:
    """Return the artifact that the server will take."""
    model: Model = Repository.open(arguments.models).find(arguments.model)
    target = arguments.target or default_target(model, arguments.precision)
    return find_source(model, ArtifactQuery(target, arguments.precision))


def make_inputs(size: tuple[int, int]) -> Inputs:
    """Return pixels of noise, and a synthetic photograph of a usual size."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32)
    (photo,) = probe_images(PHOTO, 1)
    content = io.BytesIO()
    Image.fromarray(photo.transpose(1, 2, 0)).save(content, "JPEG", quality=JPEG_QUALITY)
    return Inputs(pixels, content.getvalue())


def bare(runner: Runner, inputs: Inputs, how: Preprocess) -> dict[str, Step]:
    """Return, by name, what is done without a server."""
    return {
        "bare": lambda: done(runner.run(inputs.pixels)),
        "decode + bare": lambda: done(runner.run(load(inputs.jpeg, how)[np.newaxis])),
        "decode": lambda: done(load(inputs.jpeg, how)),
    }


def race(
    steps: Mapping[str, Step], arguments: argparse.Namespace, sitting: int, times: Times
) -> None:
    """Add what each step takes in ms, taken in turns by one client."""
    order = list(steps)
    generator = random.Random(sitting)
    for number in range(arguments.rounds + 2):
        generator.shuffle(order)
        for name in order:
            for _ in range(arguments.turn):
                begin = time.perf_counter_ns()
                assert steps[name]() == OK
                if number >= 2:  # the first ones warm up
                    times[name].append((time.perf_counter_ns() - begin) / 1e6)


def added(times: Times, way: str, turn: int) -> float:
    """Return what a way adds to its base, in ms."""
    mine, base = (
        np.median(np.reshape(times[name], (-1, turn)), axis=1) for name in (way, BASES[way])
    )
    return float(np.median(mine - base))


def rally(
    alone: Mapping[str, Step],
    ways: Mapping[str, Callable[[], Step]],
    arguments: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Return medians of images a second, each way for a slice of time in turn.

    The artifact alone is run by as many callers as there are threads, the server asked by clients.
    Ratios are within rounds, so of the same minute.
    """
    against = {"bare": "bare", "decode + bare": "decode + bare"}
    against |= {"binary": "bare", "grpc": "bare", "jpeg": "decode + bare"}

    def crew(name: str) -> list[Step]:
        if name in alone:
            return [alone[name]] * arguments.threads
        return [ways[name]() for _ in range(arguments.clients)]

    rates: dict[str, list[float]] = {name: [] for name in against}
    order = list(against)
    generator = random.Random(1)
    for number in range(arguments.slices + 1):
        generator.shuffle(order)
        for name in order:
            rate = flow(crew(name), arguments.slice_s)
            if number:
                rates[name].append(rate)
    found: dict[str, dict[str, float]] = {}
    for name, measured in rates.items():
        base = rates[against[name]]
        shares = [mine / theirs for mine, theirs in zip(measured, base, strict=True)]
        found[name] = {
            "median": statistics.median(measured),
            "share_of_bare": statistics.median(shares),
        }
    return found


def flow(crew: list[Step], seconds: float) -> float:
    """Return how many steps a second a crew takes, all at work."""
    ended = time.perf_counter() + seconds

    def work(step: Step) -> int:
        count = 0
        while time.perf_counter() < ended:
            assert step() == OK
            count += 1
        return count

    begin = time.perf_counter()
    with ThreadPoolExecutor(len(crew)) as pool:
        total = sum(pool.map(work, crew))
    return total / (time.perf_counter() - begin)


def overload(arguments: argparse.Namespace, inputs: Inputs) -> dict[str, float]:
    """Return how soon a server of a short queue refuses, under many clients, in ms."""
    refused: list[float] = []
    answered = 0
    with running(arguments, "--max-queue", "4", "--no-access-log") as server:
        make = server.ways(inputs)["binary"]
        ended = time.perf_counter() + 2 * arguments.slice_s

        def insist(step: Step) -> int:
            count = 0
            while time.perf_counter() < ended:
                begin = time.perf_counter()
                if step() == OK:
                    count += 1
                else:
                    refused.append((time.perf_counter() - begin) * 1e3)
                    time.sleep(0.25)  # far sooner than Retry-After asks
            return count

        with ThreadPoolExecutor(4 * arguments.clients) as pool:
            answered = sum(pool.map(insist, [make() for _ in range(4 * arguments.clients)]))
    quantiles = np.quantile(refused, (0.5, 0.99, 1.0)) if refused else [float("nan")] * 3
    names = ("refused_p50_ms", "refused_p99_ms", "refused_max_ms")
    return {
        "answered": answered,
        "refused": len(refused),
        **dict(zip(names, map(float, quantiles), strict=True)),
    }


def report(result: Mapping[str, Any]) -> None:
    """Print what was found, and what serving adds."""
    print(f"start to ready: {result['start_s']:.2f} s")
    for name, taken in result["latency_ms"].items():
        print(f"one client, {name:14} p50 {taken['p50']:7.2f} ms   p90 {taken['p90']:7.2f} ms")
    for way, ms in result["adds_ms"].items():
        print(f"one client, {way:14} adds {ms:6.2f} ms to {BASES[way]}")
    for name, rate in result["images_per_s"].items():
        share = rate["share_of_bare"]
        print(f"many clients, {name:14} {rate['median']:7.1f} images/s   {share:.1%} of bare")
    print("overload: " + ", ".join(f"{k} {v:.1f}" for k, v in result["overload"].items()))


if __name__ == "__main__":
    main()
