"""Load a server until it must refuse, with clients that break the rules among them, and judge it.

    coat-deploy export coat_lite_tiny --weights random:0 --models /tmp/models
    python docs/benchmarks/soak.py --models /tmp/models --minutes 10

Good clients send photographs and tensors, one request after the other, and know the right answers.
Bad ones send half a body and leave, wrong shapes, garbage for images, or hang up while they wait.
At the end SIGTERM comes in the middle of it all. It fails (exit status 1) when an answer is wrong,
a request that was taken is not answered, a refusal is late, an answer is later than the deadline,
or memory grows by 5% after the first minute.
"""

import argparse
import http.client
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from coat_deploy.images import load
from coat_deploy.machine import describe, usable_threads
from coat_deploy.measure.latency import append_records
from coat_deploy.measure.proof import probe_images
from coat_deploy.model import ArtifactQuery, Model
from coat_deploy.open import default_target, find_source, open_source
from coat_deploy.repository import Repository
from coat_deploy.runner import LoadOptions

PHOTOS = 8
TOLERANCE = 1e-4
REFUSAL_S = 0.05
"""How soon a full queue shall say so."""
SECOND_TRY_S = 2.0
"""When a connection that was kept from beginning, just before the end, is surely refused: a kernel
tries again after a second."""
LEAK = 0.05
WARM_S = 60.0
OK, REFUSED = 200, 503
READY = re.compile(r"ready: http://127\.0\.0\.1:(\d+)")


@dataclass
class Seen:
    """What all clients saw; `lock` guards it."""

    statuses: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    refusals_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[tuple[float, float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Question:
    """A request, and the logits that answer it."""

    path: str
    body: bytes
    headers: dict[str, str]
    logits: np.ndarray


def questions(model: Model, threads: int) -> list[Question]:
    """Return photographs and their pixels, each with the artifact's own answer."""
    found, path = [], f"/v2/models/{model.name}/infer"
    how = model.spec.preprocess
    source = find_source(model, ArtifactQuery(default_target(model, None)))
    with open_source(source, LoadOptions(threads=threads)) as runner:
        for image in probe_images((240, 320), PHOTOS):
            file = io.BytesIO()
            Image.fromarray(np.asarray(image).transpose(1, 2, 0)).save(file, "JPEG", quality=90)
            photo = file.getvalue()
            pixels = load(photo, how)[None]
            logits = runner.run(pixels)["logits"]
            tensors = {
                "image": ("BYTES", [1], len(photo).to_bytes(4, "little") + photo),
                "pixels": ("FP32", list(pixels.shape), pixels.tobytes()),
            }
            for name, (datatype, shape, content) in tensors.items():
                head = {
                    "inputs": [
                        {
                            "name": name, "datatype": datatype, "shape": shape,
                            "parameters": {"binary_data_size": len(content)},
                        }
                    ]
                }  # fmt: skip
                text = json.dumps(head).encode()
                headers = {"Inference-Header-Content-Length": str(len(text))}
                found.append(Question(path, text + content, headers, logits))
    return found


class Clients:
    """Threads that ask until `stopped`; `ending` tells that the server was asked to end."""

    def __init__(self, port: int, asked: list[Question], seen: Seen, deadline_s: float) -> None:
        self.port, self.asked, self.seen, self.deadline_s = port, asked, seen, deadline_s
        self.stopped, self.ending = threading.Event(), threading.Event()

    def good(self, seed: int) -> None:
        """Ask, check the answer, ask again."""
        draw = random.Random(seed)
        connection = self._connect()
        while not self.stopped.is_set():
            question = draw.choice(self.asked)
            begin = time.monotonic()
            try:
                connection.request("POST", question.path, question.body, question.headers)
                answer = connection.getresponse()
                status, content = answer.status, answer.read()
            except (OSError, http.client.HTTPException) as error:
                self._broken(begin, error)
                connection.close()
                connection = self._connect()
                continue
            self._judge(question, status, content, time.monotonic() - begin)
            if status == REFUSED:
                time.sleep(draw.uniform(0.05, 0.3))
        connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.deadline_s + 10)

    def _broken(self, begin: float, error: Exception) -> None:
        """Note a request that got no answer: only before it was taken, at the end, may it be so."""
        waited = time.monotonic() - begin
        never_begun = isinstance(error, ConnectionRefusedError) and waited < SECOND_TRY_S
        closed = isinstance(
            error, BrokenPipeError | ConnectionResetError | http.client.RemoteDisconnected
        )
        with self.seen.lock:
            if self.ending.is_set() and (never_begun or (closed and waited < 1)):
                self.seen.statuses["not taken at the end"] += 1
            else:
                self.seen.wrong.append(f"no answer after {waited:.2f} s: {error!r}")
        time.sleep(0.05)

    def _judge(self, question: Question, status: int, content: bytes, taken_s: float) -> None:
        with self.seen.lock:
            self.seen.statuses[str(status)] += 1
            if status == OK:
                self.seen.latencies_s.append(taken_s)
            elif status == REFUSED:
                self.seen.refusals_s.append(taken_s)
            else:
                self.seen.wrong.append(f"status {status}: {content[:200]!r}")
        if status != OK:
            return
        found = np.array(json.loads(content)["outputs"][0]["data"], np.float32)
        off = float(np.abs(found.reshape(question.logits.shape) - question.logits).max())
        if not off <= TOLERANCE:
            with self.seen.lock:
                self.seen.wrong.append(f"logits are off by {off:.3g}")

    def bad(self, seed: int) -> None:
        """Do what no client should, in turn."""
        draw = random.Random(seed)
        ways = (self._half, self._wrong_shape, self._garbage, self._hang_up)
        while not self.stopped.is_set():
            way = draw.choice(ways)
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=15) as connection:
                    way(connection, draw.choice(self.asked))
            except OSError:
                pass
            with self.seen.lock:
                self.seen.statuses[way.__name__.strip("_")] += 1
            time.sleep(draw.uniform(0.02, 0.1))

    def _half(self, connection: socket.socket, question: Question) -> None:
        request = _raw(question.path, question.body, question.headers)
        connection.sendall(request[: len(request) // 2])
        time.sleep(0.2)

    def _wrong_shape(self, connection: socket.socket, question: Question) -> None:
        document = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 7, 7],
                                "data": [0.0] * 147}]}  # fmt: skip
        self._expect(connection, _raw(question.path, json.dumps(document).encode(), {}), b" 400 ")

    def _garbage(self, connection: socket.socket, question: Question) -> None:
        path = question.path.replace("/v2", "").removesuffix("/infer")
        self._expect(connection, _raw(path, b"\xff\xd8\xff" + bytes(2000), {}), b" 400 ")

    def _hang_up(self, connection: socket.socket, question: Question) -> None:
        connection.sendall(_raw(question.path, question.body, question.headers))
        time.sleep(0.01)

    def _expect(self, connection: socket.socket, request: bytes, status: bytes) -> None:
        connection.sendall(request)
        line = connection.recv(64).partition(b"\r\n")[0]
        if line and status not in line and b" 503 " not in line:
            with self.seen.lock:
                self.seen.wrong.append(f"a bad request got {line!r}")


def _raw(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: soak", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def start(options: argparse.Namespace) -> "tuple[subprocess.Popen[str], int]":
    """Start the server as people do; return it and its port when it is ready."""
    command = [
        sys.executable, "-m", "coat_deploy", "serve", options.model, "--models", options.models,
        "--port", "0", "--grpc-port", "0", "--threads", options.threads, "--no-access-log",
        "--deadline", options.deadline, "--max-queue", options.queue,
    ]  # fmt: skip
    server = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        said.append(line)
        if found := READY.search(line):
            # What else it says is read, so that it never waits for a reader.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, int(found[1])
    raise SystemExit("".join(said))


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run it all; return the record."""
    model = Repository.open(options.models).find(options.model)
    asked = questions(model, options.threads)
    seen = Seen()
    server, port = start(options)
    clients = Clients(port, asked, seen, options.deadline)
    kinds = [clients.bad if i % 4 == 0 else clients.good for i in range(options.clients)]
    threads = [threading.Thread(target=kind, args=(i,)) for i, kind in enumerate(kinds)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    while time.monotonic() - begin < 60 * options.minutes:
        time.sleep(1)
        if server.poll() is not None:
            raise SystemExit(f"the server is gone (exit status {server.returncode})")
        resident = psutil.Process(server.pid).memory_info().rss / 2**20
        seen.memory_mib.append((time.monotonic() - begin, resident))
    clients.ending.set()
    server.send_signal(signal.SIGTERM)
    status = server.wait(timeout=60)
    clients.stopped.set()
    for thread in threads:
        thread.join()
    return judged(options, seen, status)


def judged(options: argparse.Namespace, seen: Seen, status: int) -> dict[str, Any]:
    """Return the record, with what is wrong."""
    warm = [mib for at, mib in seen.memory_mib if at >= min(WARM_S, 20 * options.minutes)]
    growth = max(warm[-30:]) / max(warm[:30]) - 1
    p99 = float(np.quantile(seen.latencies_s, 0.99))
    refused = float(np.quantile(seen.refusals_s, 0.99)) if seen.refusals_s else None
    wrong = list(seen.wrong)
    if status:
        wrong.append(f"exit status {status}")
    if growth >= LEAK:
        wrong.append(f"memory grew by {growth:.1%}")
    if p99 > options.deadline:
        wrong.append(f"p99 {p99:.2f} s is beyond the deadline")
    if refused is not None and refused > REFUSAL_S:
        wrong.append(f"refusals took {1000 * refused:.0f} ms")
    return {
        "kind": "soak",
        "model": options.model,
        "minutes": options.minutes,
        "clients": options.clients,
        "threads": options.threads,
        "deadline_s": options.deadline,
        "queue": options.queue,
        "statuses": dict(sorted(seen.statuses.items())),
        "p50_ms": 1000 * float(np.median(seen.latencies_s)),
        "p99_ms": 1000 * p99,
        "refusal_p99_ms": refused and 1000 * refused,
        "memory_mib": {"first": max(warm[:30]), "last": max(warm[-30:]), "growth": growth},
        "exit_status": status,
        "wrong": wrong[:20],
        "num_wrong": len(wrong),
        "machine": describe().to_json(),
    }


def main() -> None:
    """Read the options, soak, print and keep the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="coat_lite_tiny")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64, help="a quarter of them break the rules")
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds")
    parser.add_argument("--queue", type=int, default=32, help="requests that may wait")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append a line of JSON")
    options = parser.parse_args()
    record = soak(options)
    print(json.dumps(record, indent=2))
    if options.record:
        append_records(options.record, [json.dumps(record)])
    sys.exit(bool(record["num_wrong"]))


if __name__ == "__main__":
    main()
