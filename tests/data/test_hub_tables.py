"""Data sets of the Hugging Face Hub, against a stand-in for it on this machine.

The hub's address is read when its client is imported, so a process of its own does the asking.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow

COMMIT = "1" * 40
CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': cat
          '1': dog
  splits:
  - name: train
    num_examples: 12
  - name: test
    num_examples: 4
---
"""

# Steps are (label of the step, source, options); what each gave is printed as JSON.
CLIENT = """
import dataclasses, json, sys, time, urllib.request
from coat_deploy.data.sources import DataOptions, open_splits

def red(image):
    return image.getpixel((1, 1))[0]

def reds(dataset):
    return [red(dataset.image(i)) for i in range(len(dataset))]

def run(source, options):
    splits = open_splits(source, DataOptions(**options))
    train, found = splits.train, {"names": splits.train.label_names}
    found["measured"] = reds(splits.validation)
    if options:
        return found | {"length": train.length, "trained": [red(s.image) for s in train.samples(0)]}
    return found | {"name": train.name(3), "trained": reds(train)}

if __name__ == "__main__":
    import datasets
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    results = {}
    for step, source, options in json.loads(sys.argv[1]):
        try:
            urllib.request.urlopen(f"{datasets.config.HF_ENDPOINT}/step/{step}", timeout=5)
        except OSError:
            pass
        start = time.monotonic()
        try:
            results[step] = run(source, options)
        except Exception as error:
            results[step] = {"error": f"{type(error).__name__}: {error}"}
        results[step]["seconds"] = time.monotonic() - start
    print(json.dumps(results))
"""


class Hub(ThreadingHTTPServer):
    """The little of the hub that the package datasets asks for; repositories are folders."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: dict[str, list[str]] = {}
        self.step: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/step/"):
            self.server.step = self.server.asked.setdefault(path.removeprefix("/step/"), [])
            return self.send(200)
        self.server.step.append(f"{self.command} {path} {self.headers.get('Range') or 'whole'}")
        # /datasets/OWNER/NAME/resolve/REVISION/FILE, /api/datasets/OWNER/NAME/tree/REVISION/...
        found = re.match(r"(?:/api)?/datasets/(\w+/\w+)(?:/([a-z-]+)/\w+(?:/(.+))?)?$", path)
        if not found or not (repository := self.server.root / found[1]).is_dir():
            return self.send(404, error="RepoNotFound")
        place = repository / (found[3] or "")
        if found[2] in ("resolve", "tree") and not place.exists():
            return self.send(404, error="EntryNotFound")
        if found[2] == "resolve":
            return self.send_file(place.read_bytes())
        if found[2] == "tree":
            below = place.rglob("*") if "recursive=true" in self.path.lower() else place.iterdir()
            return self.send_entries(sorted(below), repository)
        if found[2] == "paths-info":
            return self.send_entries([repository / name for name in self.posted()], repository)
        return self.send(200, json.dumps({"id": found[1], "sha": COMMIT, "siblings": []}).encode())

    do_HEAD = do_POST = do_GET

    def posted(self) -> list[str]:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        return json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]

    def send_entries(self, paths: list[Path], repository: Path) -> None:
        entries = [
            {
                "type": "directory" if path.is_dir() else "file",
                "oid": "0" * 40,
                "size": path.stat().st_size,
                "path": path.relative_to(repository).as_posix(),
            }
            for path in paths
            if path.exists()
        ]
        self.send(200, json.dumps(entries).encode())

    def send_file(self, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if found := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(206, data[first : last + 1], **headers)
        return self.send(200, data, **headers)

    def send(self, status: int, data: bytes = b"", error: str = "", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Error-Code": error}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def ask(address: str, home: Path, *steps: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-W", "error", "-c", CLIENT, json.dumps(steps)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    return json.loads(run.stdout)


CLOTHES, PICTURES, STREAMED = "hub:some/clothes", "hub:some/pictures", {"streaming": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(
    library, encode, home, tmp_path_factory
) -> Iterator[tuple[dict[str, Any], dict[str, list[str]]]]:
    """What each step gave, and what it asked the hub for."""
    root = tmp_path_factory.mktemp("hub")
    fill(library, encode, root)
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        results = ask(
            f"http://127.0.0.1:{hub.server_port}", home,
            ("streamed", CLOTHES, STREAMED), ("whole", CLOTHES, {}),
            ("pictures", PICTURES, STREAMED), ("gone", "hub:some/nothing", {}),
            ("other", f"{CLOTHES}:large", {}),
        )  # fmt: skip
        hub.shutdown()
        thread.join(timeout=5)
    yield results, hub.asked


def fill(library, encode, root: Path) -> None:
    """Make a data set of parquet files with a card, and one of image files without."""
    clothes = root / "some" / "clothes"
    (clothes / "data").mkdir(parents=True)
    (clothes / "README.md").write_text(CARD)
    library.disable_progress_bars()
    for split, first, count in (("train", 0, 12), ("test", 50, 4)):
        images = [{"bytes": encode((first + i, 0, 0)), "path": f"{i}.png"} for i in range(count)]
        table = {"image": images, "label": [i % 2 for i in range(count)]}
        types = {"image": library.Image(), "label": library.ClassLabel(names=["cat", "dog"])}
        rows = library.Dataset.from_dict(table, features=library.Features(types))
        rows.to_parquet(clothes / "data" / f"{split}-00000-of-00001.parquet")
        for i, image in enumerate(images):
            file = root / "some" / "pictures" / split / ("cat", "dog")[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image["bytes"])
    library.enable_progress_bars()


def test_data_set_is_fetched_whole(online):
    results, asked = online
    assert results["whole"]["names"] == ["cat", "dog"]
    assert results["whole"]["trained"] == list(range(12))
    assert results["whole"]["measured"] == [50, 51, 52, 53]
    assert results["whole"]["name"] == "train[3] (3.png)"


def test_only_the_measured_split_of_a_stream_is_fetched_beforehand(online):
    results, asked = online
    streamed = results["streamed"]
    assert sorted(streamed["trained"]) == list(range(12)) != streamed["trained"]
    assert streamed["measured"] == [50, 51, 52, 53]
    fetched = [line for line in asked["streamed"] if line.startswith("GET") and "parquet" in line]
    assert {line.endswith("whole") for line in fetched if "/train-" in line} == {False}
    assert {line.endswith("whole") for line in fetched if "/test-" in line} == {True}


def test_length_of_a_stream_is_that_of_the_card(online):
    results, _ = online
    assert results["streamed"]["length"] == 12
    assert results["pictures"]["length"] is None


def test_image_files_of_a_stream_are_fetched_as_they_are_needed(online):
    results, asked = online
    pictures = results["pictures"]
    assert pictures["names"] == ["cat", "dog"]
    assert sorted(pictures["trained"]) == list(range(12)) != pictures["trained"]
    assert sorted(pictures["measured"]) == [50, 51, 52, 53]
    assert (
        sum(
            "GET /datasets/some/pictures/resolve" in line and "/train/" in line
            for line in asked["pictures"]
        )
        == 12
    )


def test_unknown_data_set_is_told(online):
    results, _ = online
    assert re.match(
        r"UsageError: hub:some/nothing: cannot be read \(.*doesn't exist", results["gone"]["error"]
    )


def test_unknown_configuration_is_told_with_those_there(online):
    results, _ = online
    assert re.match(
        r"UsageError: hub:some/clothes:large: .*'large' not found.*default",
        results["other"]["error"],
    )


def test_without_a_network_what_was_fetched_is_used_and_the_rest_says_what_to_do(online, home):
    results = ask("http://127.0.0.1:9", home, ("whole", CLOTHES, {}), ("gone", PICTURES, {}))
    assert results["whole"]["trained"] == list(range(12))
    told = r"DownloadError: hub:some/pictures: cannot be fetched \(.*refused\)\. .*hf download .*"
    assert re.match(told, results["gone"]["error"])
    assert results["gone"]["seconds"] < 10
