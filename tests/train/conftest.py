"""What the tests of training share: toys, one thread, and processes that meet over gloo."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent
TIMEOUT = 240

RunProcesses = Callable[..., list[str]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Toys are too small for threads: on busy cores they only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    """The module `toys.py`."""
    return load("toys")


def load(name: str) -> ModuleType:
    """Return a module of this folder by its path: test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))  # scripts import their neighbours by name
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_processes(tmp_path_factory: pytest.TempPathFactory) -> RunProcesses:
    """Return a function that runs a script of this folder in `count` processes, as torchrun would.

    They meet over gloo on this machine. It returns what each printed. When one fails, or after
    `TIMEOUT` seconds, all are ended and the test fails with what they printed.
    """

    def run(script: str, *arguments: object, count: int = 2) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
        common = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        printed = [tmp_path_factory.mktemp("process") / "printed.txt" for _ in range(count)]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for rank, path in enumerate(printed):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with path.open("wb") as file:
                    process = subprocess.Popen(
                        command, env=os.environ | common | place, stdout=file, stderr=file
                    )
                running.append(process)
            deadline = time.monotonic() + TIMEOUT
            # One that failed leaves the others waiting for it.
            while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
                assert time.monotonic() < deadline, "\n".join(path.read_text() for path in printed)
                time.sleep(0.02)
        finally:
            for process in running:
                process.kill()
                process.wait()
        for process, path in zip(running, printed, strict=True):
            assert process.returncode == 0, "\n".join(path.read_text() for path in printed)
        return [path.read_text() for path in printed]

    return run


@pytest.fixture(scope="session")
def scenarios() -> ModuleType:
    """The module `two_processes.py`, whose scenarios one process may run as well."""
    return load("two_processes")


@pytest.fixture(scope="session")
def two_processes(
    run_processes: RunProcesses, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], Path, list[str]]:
    """What both processes of `two_processes.py` found, their folder, and what each printed."""
    folder = tmp_path_factory.mktemp("two_processes")
    printed = run_processes("two_processes.py", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)], folder, printed
