"""Fixtures every folder of tests shares."""

import hashlib
import importlib.util
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coat_deploy.machine import usable_threads

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Workers side by side divide the cores, and so do the processes they start: OpenMP's threads wait
# for each other by spinning, and more of them than cores spin most of the time. Libraries read
# this once, when they are loaded, so it is set before any of them is.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_threads() // _WORKERS)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files of slow tests, so that no worker is left with a long one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runtimes compile here, in this process and in others, is not the user's to keep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _levels_of_logs_as_without_the_command_line() -> None:
    """The command line sets how much is logged, for good, and is run in this process, too: by
    tests, and by fixtures of a whole session."""
    for name in ("coat_deploy", "coat_deploy.serve"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`trace_graph`, which computes for twenty seconds even for a toy, with its graphs kept.

    A graph is traced once for all who ask for the same one, in every worker: the exporter's own
    tests are those of `graph/test_traced.py`.
    """
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from coat_deploy.graph.traced import trace_graph

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def trace(spec: Any, weights: Mapping[str, Any], options: Any) -> Any:
        asked = hashlib.sha256(json.dumps([spec.to_json(), repr(options)]).encode())
        for key, value in sorted(weights.items()):
            asked.update(key.encode() + value.tobytes())
        kept = folder / f"traced-{asked.hexdigest()}.onnx"
        if not kept.exists():
            unfinished = kept.with_suffix(f".{os.getpid()}")
            onnx.save(trace_graph(spec, weights, options), unfinished)
            unfinished.replace(kept)
        return onnx.load(kept)

    return trace


@pytest.fixture
def traced_once(trace: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports in this process take graphs that were traced before."""
    monkeypatch.setattr("coat_deploy.graph.traced.trace_graph", trace)


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, the independent implementation that the network and the images are held against.

    Its torchvision has no build for a CPU PyTorch from a package index: the import registers
    kernels for operators that the missing library would have defined. Defining them empty first
    is enough for everything but those operators.
    """
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm: pip install timm")
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        try:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # a torchvision with its library is installed
            break
    globals()["_torchvision_library"] = library  # operators live as long as this object
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("timm.data")
        return importlib.import_module("timm")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of photographs beside the checkout; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the photographs in {SHARED_DATA}, which are not part of the project")
    return SHARED_DATA
