"""docs/json.md promises keys; here every command keeps them, and stdout holds nothing else."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "json.md"

VALUES = (
    "skipped", "versions", "files", "tools", "record", "targets", "published", "per_class",
    "bytes", "inputs", "outputs", "by_precision", "by_kind", "by_stage", "options",
)  # fmt: skip
"""Objects whose keys are data: names of files, packages, targets, classes."""


def documented(heading: str) -> dict[str, Any]:
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(r"```json\n(.*?)```", section, re.DOTALL)
    assert found
    return json.loads(found[1])


def paths(document: Any, above: str = "") -> set[str]:
    """Every key, with those above it: `results[].p50_ms`."""
    if isinstance(document, list):
        return set().union(*(paths(item, f"{above}[]") for item in document))
    if not isinstance(document, dict) or above.rpartition(".")[2] in VALUES:
        return {above}
    return {above}.union(*(paths(value, f"{above}.{key}") for key, value in document.items()))


def promised(heading: str) -> set[str]:
    return paths(documented(heading))


@pytest.fixture
def labelled(photos: Path, tmp_path: Path) -> Path:
    """Photographs in folders named by labels of the toy models."""
    for i, photo in enumerate(sorted(photos.iterdir())):
        folder = tmp_path / "labelled" / ("dress", "hat")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / photo.name).symlink_to(photo)
    return tmp_path / "labelled"


def test_export_prints_what_is_documented(cli, models, photos):
    ran = cli("export", "coat_lite_toy", "--models", models, "--images", photos, "--json")
    assert (ran.status, ran.err) == (0, "")
    assert promised("export") | paths(documented("Agreement"), ".agreement") <= paths(ran.json)
    assert ran.json["agreement"]["source"] == "images"


@pytest.mark.usefixtures("two_precisions")
def test_a_choice_is_what_is_documented(cli, models):
    words = ("--precision", "auto", "--threads", "1", "--json")
    ran = cli("export", "coat_lite_toy", "--models", models, *words)
    assert ran.status == 0, ran.err
    assert promised("export") <= paths(ran.json)
    assert paths(documented("Choice"), ".choice") <= paths(ran.json)


def test_an_engine_and_its_census_are_what_is_documented(cli, models):
    pytest.importorskip("tensorrt_rtx")
    section = PAGE.read_text(encoding="utf-8").split("\n## export\n")[1].split("\n## ")[0]
    engine = json.loads(re.findall(r"```json\n(.*?)```", section, re.DOTALL)[1])
    words = ("--target", "tensorrt-rtx", "--models", models, "--json")
    ran = cli("export", "coat_lite_toy", *words)
    assert ran.status == 0, ran.err
    assert promised("export") | paths(engine) <= paths(ran.json) | {".engine", ".census"}


def test_triton_prints_what_is_documented(cli, models, tmp_path):
    words = ("--models", models, "--out", tmp_path / "repository", "--json")
    assert promised("triton") <= paths(cli("triton", "coat_toy", *words).json)


def test_kserve_prints_what_is_documented(cli, models):
    words = ("--models", models, "--storage", "pvc://models", "--image", "coat", "--json")
    assert promised("kserve") <= paths(cli("kserve", "coat_toy", *words).json)


def test_inspect_prints_what_is_documented(cli, models):
    told = cli("inspect", "coat_toy/onnxruntime-fp32", "--models", models, "--json").json
    assert promised("inspect") <= paths(told)


def test_validate_prints_what_is_documented(cli, models, labelled, damage):
    damage(models / "coat_lite_toy", "serial_blocks2.0.mlp.fc1")
    words = ("--images", labelled, "--by-block", "--json")
    ran = cli("validate", "coat_lite_toy", "--models", models, *words)
    assert ran.status == 3
    assert promised("validate") | paths(documented("Agreement")) <= paths(ran.json)


def test_evaluate_prints_what_is_documented(cli, models, labelled):
    ran = cli("evaluate", "coat_lite_toy", "--data", labelled, "--models", models, "--json")
    assert ran.status == 0, ran.err
    assert promised("evaluate") <= paths(ran.json)
    (one_class,) = documented("evaluate")["per_class"].values()
    assert set(ran.json["per_class"]) == set(ran.json["labels"])
    assert all(set(one_class) <= set(found) for found in ran.json["per_class"].values())


def test_predict_prints_what_is_documented(cli, models, photos):
    ran = cli("predict", "coat_lite_toy", photos, "--models", models, "--json")
    assert ran.status == 0, ran.err
    assert promised("predict") <= paths(ran.json)


def test_predict_into_a_folder_prints_what_is_documented(cli, models, photos, tmp_path):
    pytest.importorskip("pyarrow")
    words = ("--models", models, "--out", tmp_path / "labels", "--json")
    ran = cli("predict", "coat_lite_toy", photos, *words)
    assert ran.status == 0, ran.err
    assert promised("predict --out") <= paths(ran.json)


def test_selftest_prints_what_is_documented(cli, models):
    ran = cli("selftest", "coat_lite_toy", "--models", models, "--json")
    assert (ran.status, ran.err) == (0, "")
    assert promised("selftest") <= paths(ran.json)


def test_models_prints_what_is_documented(cli, models):
    ran = cli("models", "--models", models, "--json")
    assert (ran.status, ran.err) == (0, "")
    assert promised("models") <= paths(ran.json)


def test_models_show_prints_what_is_documented(cli, models):
    ran = cli("models", "show", "coat_lite_toy", "--models", models, "--json")
    assert (ran.status, ran.err) == (0, "")
    assert promised("models show") <= paths(ran.json)


def test_doctor_prints_what_is_documented(cli):
    ran = cli("doctor", "--json")
    assert promised("doctor") <= paths(ran.json)


def test_bench_prints_what_is_documented(cli, models, brief, quick_limits):
    words = ("--targets", "onnxruntime", "--limits", "--budget", "0.1", "--threads", "1", "--json")
    ran = cli("bench", "coat_lite_toy", "--models", models, *words)
    assert (ran.status, ran.err) == (0, "")
    without_peer = {".results[].peer_ratio_interval[]"}  # tests/cli/test_peers.py has one
    assert promised("bench") - without_peer <= paths(ran.json)
    assert paths(documented("Agreement"), ".results[].agreement") <= paths(ran.json)


def test_bench_throughput_prints_what_is_documented(cli, models, brief):
    words = ("--targets", "onnxruntime", "--budget", "0.1", "--threads", "1", "--json")
    ran = cli("bench", "coat_lite_toy", "--models", models, "--throughput", "--batch", "2", *words)
    assert (ran.status, ran.err) == (0, "")
    assert promised("bench --throughput") <= paths(ran.json)
    assert paths(documented("Agreement"), ".results[].agreement") <= paths(ran.json)


@pytest.mark.parametrize("format", ["table", "json"])
def test_results_go_to_stdout_and_all_else_to_stderr(format, script, models, own_photos):
    """In a process of its own, where a runtime's own printing would show."""
    (own_photos / "torn.jpg").write_bytes(b"\xff\xd8 no more")
    flags = ("--json",) if format == "json" else ()
    words = ("--models", models, "--images", own_photos, "--target", "openvino", *flags)
    ran = script("validate", "coat_lite_toy", *words)
    assert ran.status == 0
    assert "torn.jpg" in ran.err and len(ran.err.splitlines()) == 2
    if format == "json":
        assert list(ran.json["skipped"]) == [str(own_photos / "torn.jpg")]
    else:
        assert ran.out.startswith("PASSED: coat_lite_toy openvino-fp32 ")
        assert max(map(len, ran.out.splitlines())) <= 80


def test_an_error_leaves_stdout_empty(script, bare):
    ran = script("export", "coat_lite_toy", "--models", bare, "--json")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.count("\n") == 1


def test_gpu_report_prints_what_is_documented(cli, monkeypatch):
    from coat_deploy.gpu_report import keep
    from coat_deploy.gpu_report.options import ReportOptions
    from coat_deploy.gpu_report.report import Report
    from coat_deploy.machine import Gpu, describe

    machine = dataclasses.replace(describe(), gpus=(Gpu("A GPU", "580.95.05", 81559),))
    numbers = dict.fromkeys(
        ("way", "variant", "precision", "relative_to_float64", "max_abs_difference",
         "centred_cosine", "top1_agreement")
    ) | {"failures": []}  # fmt: skip
    timing = dict.fromkeys(
        ("way", "variant", "precision", "p50_ms", "p90_ms", "p99_ms", "iterations", "device_ms",
         "images_per_second", "power_w", "joules_per_image", "clock_mhz", "memory_mib",
         "device_memory_mib")
    ) | {"batch": 1}  # fmt: skip
    checks = [{"check": "it is on the GPU", "passed": True}]
    skipped = [{"what": "a way", "why": "a reason"}]
    found = Report(ReportOptions(), machine, checks, [numbers], [timing], skipped)
    monkeypatch.setattr(keep, "report", lambda options, progress: found)
    ran = cli("gpu-report", "--json")
    assert ran.status == 0, ran.err
    assert promised("gpu-report") <= paths(ran.json)


def test_a_report_without_a_gpu_is_one_line(cli, monkeypatch):
    from coat_deploy.gpu_report import report
    from coat_deploy.gpu_report.apart import Told

    monkeypatch.setattr(report, "run_apart", lambda *arguments: Told())
    ran = cli("gpu-report")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("coat-deploy: gpu-report: PyTorch finds no NVIDIA GPU.")
    assert ran.err.count("\n") == 1
