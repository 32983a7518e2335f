import dataclasses
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from coat_deploy.errors import BackendMissing, UsageError
from coat_deploy.machine import Machine
from coat_deploy.measure.latency import ColdWarm, Latency
from coat_deploy.measure.plot import plot

MACHINE = Machine(
    cpu="A processor",
    cores=2,
    threads=4,
    cpu_quota=None,
    cpu_features=("avx2",),
    memory_mib=8192,
    system="Linux 6.1",
    python="3.11.7",
    versions={"torch": "2.13.0"},
)


def result(name: str, p50_ms: float, *, batch: int = 1, ratio: float | None = None) -> Latency:
    return Latency(
        name=name,
        target=name.partition("-")[0],
        precision="fp32",
        form="plain",
        batch=batch,
        size=(224, 224),
        threads=1,
        sha256=None,
        p50_ms=p50_ms,
        p90_ms=p50_ms * 1.1,
        p99_ms=p50_ms * 1.3,
        median_interval_ms=(p50_ms * 0.98, p50_ms * 1.02),
        images_per_second=batch / p50_ms * 1e3,
        ratio=ratio,
        ratio_interval=None if ratio is None else (ratio * 0.97, ratio * 1.03),
        baseline=None if ratio is None else "eager-fp32",
        load_ms=ColdWarm(1, 1),
        first_run_ms=ColdWarm(1, 1),
        file_evicted=None,
        peak_memory_mib=None,
        peak_memory_source=None,
        memory_before_load_mib=None,
        iterations=100,
        rounds=10,
        stopped="budget",
    )


RESULTS = [
    result("eager-fp32", 40, ratio=1),
    result("onnxruntime-fp32", 20, ratio=2),
    result("eager-fp32", 300, batch=8, ratio=1),
    result("onnxruntime-fp32", 160, batch=8, ratio=1.875),
]


@pytest.fixture(autouse=True)
def _needs_matplotlib() -> None:
    pytest.importorskip("matplotlib")


def texts(file: Path) -> list[str]:
    """Every text of an SVG, in drawing order: matplotlib notes it beside the glyphs' outlines."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.parse(file, parser)
    return [str(node.text).strip() for node in tree.iter(ElementTree.Comment)]


def test_a_png_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "latency.png"
    plot(RESULTS, file, machine=MACHINE)
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [file]


def test_the_picture_names_contenders_figures_ratios_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "latency.svg"
    plot(RESULTS, file, machine=MACHINE, title="coat_tiny")
    words = "\n".join(texts(file))
    for wanted in (
        *("coat_tiny: latency, ms a batch", "eager-fp32", "onnxruntime-fp32"),
        *("batch 1  ·  224x224  ·  1 thread", "batch 8", "40.0", "20.0", "300", "160"),
        *("2.00×", "1.94 to 2.06", "1.88×", "baseline", "against eager-fp32"),
        *("A processor, 2 cores, 8 GiB, Linux 6.1", "torch 2.13.0", "shorter is better"),
    ):
        assert wanted in words


def test_the_fastest_is_on_top_of_its_batch(tmp_path: Path) -> None:
    file = tmp_path / "latency.svg"
    plot(RESULTS, file, machine=MACHINE)
    names = [text for text in texts(file) if text in ("eager-fp32", "onnxruntime-fp32")]
    assert names == ["onnxruntime-fp32", "eager-fp32"] * 2


def test_throughput_shows_images_a_second(tmp_path: Path) -> None:
    file = tmp_path / "throughput.svg"
    plot(RESULTS, file, machine=MACHINE, metric="throughput")
    words = texts(file)
    assert "Throughput, images/s" in words
    assert {"25.0", "50.0", "26.7"} <= set(words)


def test_without_a_baseline_no_ratio_is_spoken_of(tmp_path: Path) -> None:
    file = tmp_path / "latency.svg"
    plot([result("eager-fp32", 40)], file, machine=MACHINE)
    words = "\n".join(texts(file))
    assert "×" not in words and "Ratio" not in words and "against" not in words


def test_the_same_results_give_the_same_svg(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        plot(RESULTS, tmp_path / name, machine=MACHINE)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_long_names_and_dollars_are_drawn_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "latency.svg"
    long = dataclasses.replace(RESULTS[1], name="$" + "onnxruntime-fp32-" * 6 + "$")
    plot([RESULTS[0], long], file, machine=MACHINE)
    assert long.name in texts(file)


@pytest.mark.parametrize("name", ["latency.pdf", "latency"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"expected \.png or \.svg"):
        plot(RESULTS, tmp_path / name, machine=MACHINE)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendMissing, match=r'pip install "coat-deploy\[plot\]"'):
        plot(RESULTS, tmp_path / "latency.png", machine=MACHINE)


def test_a_picture_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "latency.png"
    file.write_bytes(b"the old one")
    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(UsageError, match=r"latency\.png.*No space left on device"):
        plot(RESULTS, file, machine=MACHINE)
    assert file.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.*No such file or directory"):
        plot(RESULTS, tmp_path / "nowhere" / "latency.png", machine=MACHINE)
