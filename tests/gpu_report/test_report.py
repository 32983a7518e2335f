"""The order, the budget and the words of a report, with ways and processes that are made up."""

import datetime
import functools
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from coat_deploy.errors import BackendMissing, DeviceMissing, UsageError
from coat_deploy.gpu_report import __main__ as door
from coat_deploy.gpu_report import fused_ways, nvml, placement, report, runtime_ways, timing
from coat_deploy.gpu_report.apart import Told
from coat_deploy.gpu_report.budget import Budget
from coat_deploy.gpu_report.networks import images, write_graph
from coat_deploy.gpu_report.numerics import compare
from coat_deploy.gpu_report.options import PUBLISHED, ReportOptions, parse_variants
from coat_deploy.gpu_report.render import to_markdown, to_record
from coat_deploy.gpu_report.timing import Step, measure
from coat_deploy.gpu_report.torch_ways import torch_ways
from coat_deploy.gpu_report.way import Way

TOY = ReportOptions(
    variants=("coat_lite_toy", "coat_toy"), bench=("coat_lite_toy",), batches=(4, 1), device="cuda"
)


def way(name, precision="fp16", missing=None, **fields):
    return Way(f"{name} {precision}", precision, None, lambda device: missing, **fields)


@pytest.fixture
def made_up(monkeypatch):
    """A GPU whose ways answer as told: `answers` by the name of what is run, or a function."""
    answers, run = {}, []
    eager, best = way("eager", "fp32"), way("compile max-autotune", checked=False)
    monkeypatch.setattr(report, "torch_ways", lambda: [eager, way("eager amp"), best])
    monkeypatch.setattr(report, "fused_ways", lambda: [way("fused", missing="no kernels")])
    monkeypatch.setattr(report, "runtime_ways", lambda: [way("tensorrt", missing="no engine")])
    monkeypatch.setattr(report, "require_gpu", lambda: None)
    monkeypatch.setattr(report, "not_there", lambda *names: None)

    def run_apart(work, arguments, seconds):
        name = work.__name__
        run.append((name, *(a.name for a in arguments if isinstance(a, Way)), round(seconds)))
        answer = answers.get(run[-1][:2], answers.get(name))
        return answer(*arguments) if answer else good(name, *arguments)

    monkeypatch.setattr(report, "run_apart", run_apart)
    return answers, run


def good(name, *arguments):
    if name == "make_references":
        return Told([{"variant": v} for v in arguments[0]])
    if name == "check_placement":
        return Told([{"check": "all on the GPU", "passed": True}])
    if name == "check_numbers":
        return Told([numbers(arguments[0], v) for v in arguments[1]])
    return Told([speed(arguments[0], arguments[1], b) for b in arguments[2].batches])


def numbers(a_way, variant, **fields):
    return {
        "way": a_way.name, "variant": variant, "precision": a_way.precision,
        "relative_to_float64": 1e-3, "failures": [],
    } | fields  # fmt: skip


def speed(a_way, variant, batch):
    rate = {"compile max-autotune fp16": 1000.0, "eager amp fp16": 500.0}.get(a_way.name, 100.0)
    return {
        "way": a_way.name, "variant": variant, "batch": batch, "p50_ms": 1.0, "device_ms": 0.9,
        "images_per_second": rate, "power_w": None, "memory_mib": None, "device_memory_mib": 812,
    }  # fmt: skip


def test_everything_is_checked_and_timed_and_what_is_missing_said(made_up) -> None:
    found = report.report(TOY)
    assert found.sound
    assert [row["variant"] for row in found.numerics] == ["coat_lite_toy", "coat_toy"] * 2
    assert {row["way"] for row in found.numerics} == {"eager fp32", "eager amp fp16"}
    assert [(row["way"], row["batch"]) for row in found.bench] == list(
        itertools.product(("eager fp32", "eager amp fp16", "compile max-autotune fp16"), (4, 1))
    )
    assert found.skipped == [
        {"what": "fused fp16", "why": "no kernels"},
        {"what": "tensorrt fp16", "why": "no engine"},
    ]


def test_only_ways_that_are_asked_for_are_checked_and_timed(made_up) -> None:
    found = report.report(replace(TOY, ways=("eager amp", "compile max-autotune fp16")))
    assert {row["way"] for row in found.numerics} == {"eager amp fp16"}
    assert {row["way"] for row in found.bench} == {"eager amp fp16", "compile max-autotune fp16"}
    with pytest.raises(
        UsageError, match=r"none is called fusd \(known: eager fp32, eager amp fp16"
    ):
        report.report(replace(TOY, ways=("eager amp", "fusd")))


def test_without_networks_to_check_all_time_is_for_timing(made_up) -> None:
    found = report.report(replace(TOY, variants=parse_variants(("none",))))
    assert not found.numerics and not found.checks and found.bench
    assert parse_variants(()) == PUBLISHED and parse_variants(("coat_tiny",)) == ("coat_tiny",)


def test_a_crash_keeps_what_was_found_before_and_the_others_go_on(made_up) -> None:
    answers, _ = made_up
    answers["time_way", "eager amp fp16"] = lambda a_way, variant, place, seconds: Told(
        [speed(a_way, variant, 4)], "its process was killed by SIGSEGV."
    )
    found = report.report(TOY)
    assert not found.sound
    assert found.failed == [
        {
            "what": "eager amp fp16, coat_lite_toy",
            "why": "its process was killed by SIGSEGV.; not reached: batch 1",
        }
    ]
    assert [row["way"] for row in found.bench].count("eager amp fp16") == 1
    assert [row["way"] for row in found.bench].count("compile max-autotune fp16") == 2


def test_a_batch_or_network_that_fails_is_told_of_alone(made_up) -> None:
    answers, _ = made_up
    answers["time_way", "eager fp32"] = lambda a_way, variant, place, seconds: Told(
        [{"way": a_way.name, "batch": 4, "error": "memory"}, speed(a_way, variant, 1)]
    )
    answers["check_numbers", "eager fp32"] = lambda a_way, variants, place: Told(
        [{"way": a_way.name, "variant": "coat_toy", "error": "no kernel"}, numbers(a_way, "x")]
    )
    found = report.report(TOY)
    assert found.failed == [
        {"what": "numbers of eager fp32, coat_toy", "why": "no kernel"},
        {"what": "eager fp32, coat_lite_toy, batch 4", "why": "memory"},
    ]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("check_placement", Told([{"check": "a stray node is refused", "passed": False}])),
        ("check_numbers", Told([numbers(way("eager"), "coat_toy", failures=["too far."])])),
    ],
)
def test_a_check_that_is_not_kept_is_unsound(made_up, name, answer) -> None:
    answers, _ = made_up
    answers[name] = lambda *arguments: answer
    found = report.report(TOY)
    assert not found.sound and not found.failed
    page = to_markdown(found)
    assert "stray node is refused: NO" in page or "coat_toy: too far." in page


def test_without_references_no_numbers_are_checked(made_up) -> None:
    answers, run = made_up
    answers["make_references"] = lambda *arguments: Told([], "out of memory")
    found = report.report(TOY)
    assert found.numerics == [] and found.bench
    assert found.failed[0]["why"] == "out of memory; not reached: coat_lite_toy, coat_toy"


def test_what_the_budget_does_not_reach_is_skipped_with_the_reason(made_up) -> None:
    found = report.report(replace(TOY, budget_s=16))
    told = {row["what"]: row["why"] for row in found.skipped}
    assert told["compile max-autotune fp16, coat_lite_toy"] == (
        "13 s of the budget are left, and it takes about 15"
    )
    assert not found.bench and not found.failed


def test_checks_leave_time_for_timing(made_up) -> None:
    _, run = made_up
    report.report(replace(TOY, budget_s=100))
    checks = [call[-1] for call in run if call[0] != "time_way"]
    assert checks and max(checks) <= 45


def test_a_budget_allots_what_there_is() -> None:
    assert Budget(100).allot(10, 30) == (30, None)
    seconds, reason = Budget(20).allot(10, 30)
    assert reason is None and 15 < seconds <= 17
    assert Budget(5).allot(10, 30)[1] == "2 s of the budget are left, and it takes about 10"


def test_a_record_is_one_line_and_a_page_has_the_ratio_to_beat(made_up) -> None:
    found = report.report(TOY)
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    document = json.loads(to_record(found, "coat-deploy gpu-report", now))
    assert (document["kind"], document["date"]) == ("gpu-report", "2026-01-02T00:00:00+00:00")
    assert len(document["bench"]) == 6 and document["sound"] is True
    page = to_markdown(found)
    assert "| eager amp fp16 | 1 | 1.000 | 0.900 | 500 | 0.50x | - | 812 |" in page
    assert "| eager fp32 | 0.001 | 0.001 |" in page
    assert "- tensorrt fp16: no engine" in page


# Without a GPU, or PyTorch.


def test_without_a_gpu_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(report, "run_apart", lambda *arguments: Told())
    with pytest.raises(DeviceMissing, match=r"finds no NVIDIA GPU\. Run it where there is one"):
        report.report(TOY)


def test_without_pytorch_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(report, "no_torch", lambda device: "torch is not installed")
    with pytest.raises(BackendMissing, match=r"torch is not installed\. Run: pip install"):
        report.report(TOY)


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "gpu"},
        {"variants": ("coat_tini",)},
        {"batches": ()},
        {"budget_s": 0},
        {"variants": (), "bench": ()},
    ],
)
def test_options_that_cannot_be_are_refused(fields) -> None:
    with pytest.raises(UsageError):
        ReportOptions(**fields)


def test_the_door_without_typer_is_the_same_report(made_up, capsys, tmp_path) -> None:
    words = ("--bench", "coat_lite_toy", "--batch", "4,1", "--markdown", str(tmp_path / "r.md"))
    assert door.main([*words, "--record", str(tmp_path / "r.jsonl"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "r.jsonl").read_text())
    assert shown["bench"] == kept["bench"] and shown["options"]["variants"] == list(PUBLISHED)
    assert kept["command"].startswith("python -m coat_deploy.gpu_report --bench coat_lite_toy")
    assert (tmp_path / "r.md").read_text().startswith("# Ways to run CoaT")


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("--batch", "1,x"), 2, "whole numbers"),
        (("--bench", "coat_tini"), 2, "Did you mean"),
        (("--record", "no/such/folder.jsonl"), 2, "Make the folder first"),
    ],
)
def test_the_door_tells_wrong_usage_in_a_line(made_up, capsys, words, status, told) -> None:
    assert door.main(list(words)) == status
    shown = capsys.readouterr()
    assert told in shown.err and shown.err.count("\n") == 1 and shown.out == ""


# The parts that are run apart.


def test_a_step_is_timed_alone_and_in_a_row() -> None:
    calls = []
    step = Step(lambda: calls.append("launch"), lambda: calls.append("wait"))
    found = measure(step, 8, 0.02, nvml.Nvml())
    assert found["batch"] == 8 and found["iterations"] >= timing.LEAST
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"]
    assert found["images_per_second"] > 0 and found["device_ms"] is None
    assert ["launch", "launch"] in [calls[i : i + 2] for i in range(len(calls))]


def test_a_machine_without_a_driver_tells_no_power(monkeypatch) -> None:
    monkeypatch.setattr(nvml, "_LIBRARY", "libnothing.so.9")
    found = nvml.Nvml("GPU-1")
    assert (found.millijoules(), found.used_mib(), found.clock_mhz()) == (None, None, None)


def test_power_and_memory_are_the_drivers(monkeypatch) -> None:
    class Driver:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, handle):
            return 0 if uuid == b"GPU-1" else 6

        def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
            value._obj.value = 1234567
            return 0

        def nvmlDeviceGetMemoryInfo(self, handle, value):
            value._obj.used = 5 << 30
            return 0

        def nvmlDeviceGetClockInfo(self, handle, kind, value):
            return 3  # not supported

    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Driver())
    found = nvml.Nvml("GPU-1")
    assert (found.millijoules(), found.used_mib(), found.clock_mhz()) == (1234567, 5120, None)


def test_numbers_are_held_against_the_bar_and_their_own_limit() -> None:
    random = np.random.default_rng(0)
    double = random.standard_normal((4, 50))
    single = double.astype(np.float32)
    near = (double * (1 + 1e-3 * random.standard_normal(double.shape))).astype(np.float32)
    assert compare(way("x"), near, single, double)["failures"] == []
    assert compare(way("x", "fp32"), near, single, double)["failures"]
    limited = compare(way("x", relative_limit=1e-4), near, single, double)
    assert "above 0.0001" in limited["failures"][-1]
    broken = compare(way("x"), np.full_like(single, np.nan), single, double)
    assert broken["relative_to_float64"] is None and broken["failures"]


def test_ways_are_named_once_and_can_be_sent_to_processes() -> None:
    import pickle

    ways = [*torch_ways(), *fused_ways.fused_ways(), *runtime_ways.runtime_ways()]
    names = [a_way.name for a_way in ways]
    assert len(set(names)) == len(names)
    for a_way in ways:
        assert isinstance(a_way.open, functools.partial)
        assert pickle.loads(pickle.dumps(a_way)).name == a_way.name
        assert a_way.missing("cpu") is None or isinstance(a_way.missing("cpu"), str)


def test_fused_kernels_that_are_not_there_are_said_to_be(monkeypatch) -> None:
    monkeypatch.setattr(fused_ways, "MODULE", "coat_deploy.network.nothing.fuse")
    assert fused_ways.no_fused("cpu") == "this checkout has no coat_deploy.network.nothing.fuse"


def test_graphs_are_written_for_runtimes_and_images_for_all(tmp_path) -> None:
    graph = write_graph("coat_lite_toy", "tensorrt", "bf16", tmp_path)
    assert graph.path.is_file() and set(graph.asked.precisions.values()) == {"bf16", "fp32"}
    pixels = images("coat_lite_toy", 20)
    assert pixels.shape == (20, 3, 64, 64) and pixels.flags["C_CONTIGUOUS"]


def test_the_stray_graph_is_sound_and_for_the_cpu(tmp_path) -> None:
    import onnxruntime

    path = placement.write_stray(tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = np.broadcast_to(np.eye(32, dtype=np.float32), (2, 3, 32, 32)).copy()
    assert np.allclose(session.run(None, {"pixels": pixels})[0], 1)
