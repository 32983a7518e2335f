"""Toy models, photographs and two ways to run a command: in this process, and in one of its own."""

import contextlib
import functools
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coat_deploy.backends.select import PRECISIONS
from coat_deploy.cli.app import main
from coat_deploy.graph import gemm
from coat_deploy.graph.form import FORMS
from coat_deploy.measure import bench as measure
from coat_deploy.measure import limits
from coat_deploy.measure.proof import probe_images

ROOT = Path(__file__).resolve().parents[2]
LABELS = ["bag", "boot", "coat", "dress", "hat", "pants", "shirt", "shoes", "skirt", "sock"]
NUM_PHOTOS = 13


@dataclass(frozen=True)
class Ran:
    """What came of a command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command run in this process sets levels and handlers for all of it."""
    handlers = list(logging.root.handlers)
    yield
    logging.getLogger("coat_deploy").setLevel(logging.NOTSET)
    logging.root.handlers[:] = handlers


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The machine is small, and so are the networks."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, where only --models finds models, besides the published."""
    monkeypatch.delenv("COAT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)


def run_here(*words: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as left:
            status = left.code
    assert isinstance(status, int)
    return Ran(status, out.getvalue(), err.getvalue())


@pytest.fixture
def cli() -> Callable[..., Ran]:
    """Run a command line in this process, as far as its exit."""
    return run_here


def environment(**changes: str) -> dict[str, str]:
    """The environment, so that no runtime takes more than a thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **changes}


def command(words: Sequence[object]) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), *map(str, words)]


@pytest.fixture
def script() -> Callable[..., Ran]:
    """Run a command line in a process of its own, with pipes for streams."""

    def run(*words: object, **changes: str) -> Ran:
        done = subprocess.run(
            command(words), env=environment(**changes), capture_output=True, timeout=120
        )
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def started() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a command line as the leader of a process group; whatever is left is ended."""
    processes: list[subprocess.Popen[str]] = []

    def start(*words: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command(words),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.communicate(timeout=30)


def config(architecture: str) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "num_classes": len(LABELS),
        "label_names": LABELS,
        "pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.9},
    }


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A repository of two toy models with a config, no weights and no artifact."""
    folder = tmp_path / "bare"
    for name in ("coat_lite_toy", "coat_toy"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config(name)))
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of two toy models, exported for both runtimes; not to be written to."""
    folder = tmp_path_factory.mktemp("exported")
    for name in ("coat_lite_toy", "coat_toy"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config(name)))
        for target in ("onnxruntime", "openvino"):
            words = ("--target", target, "--models", folder)
            made = run_here("export", name, "--weights", "random:0", *words)
            assert made.status == 0, made.err
    return folder


@pytest.fixture(scope="session")
def packaged(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a package of coat_lite_toy, and what its export printed as export.json."""
    from coat_deploy.network import package

    folder = Path(shutil.copytree(exported, tmp_path_factory.mktemp("packaged") / "models"))
    words = ("--target", "aotinductor", "--models", folder, "--json")
    quick = {**package.CONFIG, "aot_inductor.compile_wrapper_opt_level": "O0"}  # to compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "CONFIG", quick)
        made = run_here("export", "coat_lite_toy", *words)
    assert (made.status, made.err) == (0, ""), made.err
    (folder / "export.json").write_text(made.out)
    return folder


@pytest.fixture
def models(exported: Path, tmp_path: Path) -> Path:
    """A copy of `exported` that the test may do with as it likes."""
    return Path(shutil.copytree(exported, tmp_path / "models"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEG files."""
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(probe_images((90, 120), NUM_PHOTOS)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"photo_{i:02}.jpg")
    return folder


@pytest.fixture
def own_photos(photos: Path, tmp_path: Path) -> Path:
    """A copy of `photos` that the test may break."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def damage() -> Callable[..., None]:
    """Change one weight in a model's ONNX file; its name is a parameter's, less `.weight`."""
    import onnx
    from onnx import numpy_helper

    def change(folder: Path, name: str, target: str = "onnxruntime", by: float = 0.5) -> None:
        path = folder / "1" / f"{target}-fp32.onnx"
        graph = onnx.load(path)
        tensor = next(t for t in graph.graph.initializer if t.name == f"{name}.weight")
        values = numpy_helper.to_array(tensor).copy()
        values.flat[values.size // 2] += by
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(graph, path)

    return change


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a bench measure as little as it can."""
    options = functools.partial(
        measure.BenchOptions, warmup_iterations=1, warmup_s=0, min_rounds=6, slice_ms=5
    )
    monkeypatch.setattr(measure, "BenchOptions", options)


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure what the machine allows by small products and little memory."""
    monkeypatch.setattr(gemm, "Gemm", functools.partial(gemm.Gemm, side=64, products=1))
    monkeypatch.setattr(limits, "RATE_S", 0.0)
    monkeypatch.setattr(limits, "MOST_MIB", 2)


@pytest.fixture
def two_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let onnxruntime have two precisions, whatever the CPU, and a choice take no time."""
    from coat_deploy import choose

    def brief(budget_s: float, baseline: str) -> measure.BenchOptions:
        return measure.BenchOptions(
            budget_s=0, baseline=baseline, warmup_iterations=1, warmup_s=0, min_rounds=6, slice_ms=5
        )

    monkeypatch.setitem(PRECISIONS, "onnxruntime", ("fp32", "bf16"))
    monkeypatch.setitem(FORMS["onnxruntime"], "bf16", FORMS["onnxruntime"]["fp32"])
    monkeypatch.setattr(choose, "BenchOptions", brief)
