import dataclasses
from typing import Any

import pytest

from coat_deploy.cli.bench_report import render
from coat_deploy.machine import Machine
from coat_deploy.measure.bench import BenchOptions, BenchReport
from coat_deploy.measure.latency import ColdWarm, Latency
from coat_deploy.measure.limits import Bandwidth, Limits, Rate, Work

MACHINE = Machine("Some CPU", 2, 2, None, (), 8192, "Linux 6", "3.11", {})
PLAIN = Latency(
    name="onnxruntime", target="onnxruntime", precision="fp32", form="authored", batch=1,
    size=(64, 64), threads=None, sha256=None, p50_ms=20.0, p90_ms=21.0, p99_ms=22.0,
    median_interval_ms=(19.5, 20.5), images_per_second=50.0, ratio=None, ratio_interval=None,
    baseline=None, load_ms=ColdWarm(1, 1), first_run_ms=ColdWarm(1, 1), file_evicted=None,
    peak_memory_mib=100.0, peak_memory_source="VmHWM", memory_before_load_mib=30.0,
    iterations=60, rounds=10, stopped="stable",
)  # fmt: skip
EXACT = {"max_abs_difference": 8.3e-07, "centred_cosine": 1.0}
ROUNDED = {"max_abs_difference": 0.03, "centred_cosine": 0.99991}


def result(name: str, **changes: Any) -> Latency:
    return dataclasses.replace(PLAIN, name=name, **changes)


PEERS = (
    result("eager", target="eager", form="network", limit_ms=0.4, limit_share=0.02),
    result("onnxruntime:traced", form="traced"),
    result(
        "onnxruntime", peer="onnxruntime:traced", peer_ratio=1.58,
        peer_ratio_interval=(1.55, 1.61), limit_ms=10.8, limit_share=0.54,
    ),
    result(
        "onnxruntime:int8", precision="int8", peer="onnxruntime:traced", peer_ratio=2.1,
        peer_ratio_interval=(2.0, 2.2),
    ),
)  # fmt: skip
AGREEMENTS = {"onnxruntime:traced": EXACT, "onnxruntime": EXACT, "onnxruntime:int8": ROUNDED}
LIMITS = Limits(
    Work(1_600_000_000, 5_700_000, (64, 64)),
    (Rate("onnxruntime", "fp32", None, 301.2), Rate("openvino", "bf16", None, 1480.0)),
    (Bandwidth(None, 26.8),),
)


def table(*results: Latency, limits: Limits | None = None) -> list[str]:
    report = BenchReport(results, (), BenchOptions(), MACHINE)
    return render("toy", report, AGREEMENTS, limits).splitlines()


def rows(lines: list[str]) -> dict[str, str]:
    """The lines of the second table by their first word."""
    start = next(i for i, line in enumerate(lines) if "agreement with PyTorch" in line)
    return {line.split()[0]: line for line in lines[start + 1 : start + 5]}


def test_a_result_is_held_against_traced_the_limit_and_pytorch():
    line = rows(table(*PEERS, limits=LIMITS))["onnxruntime"]
    assert line.split() == [
        *("onnxruntime", "1.58x", "1.55", "to", "1.61", "54%", "max", "|delta|", "8.3e-07"),
    ]


def test_a_result_that_is_rounded_shows_the_cosine_and_not_the_difference():
    line = rows(table(*PEERS, limits=LIMITS))["onnxruntime:int8"]
    assert line.endswith("centred cosine 0.999910") and "0.03" not in line


def test_what_there_is_no_figure_for_is_a_dash():
    found = rows(table(*PEERS, limits=LIMITS))
    assert found["eager"].split() == ["eager", "-", "-", "2%", "-"]
    assert found["onnxruntime:traced"].split()[:4] == ["onnxruntime:traced", "-", "-", "-"]


def test_a_result_held_against_another_precision_says_so():
    lines = table(*PEERS)
    assert [line for line in lines if "is held against onnxruntime:traced" in line] == [
        "onnxruntime:int8 is held against onnxruntime:traced, which computes in fp32."
    ]


def test_the_limit_is_explained_with_the_measured_rates():
    text = " ".join(table(*PEERS, limits=LIMITS))
    assert "2 x 1.60 G operations an image" in text
    assert "onnxruntime fp32 301 GFLOP/s, openvino bf16 1480 GFLOP/s; memory 26.8 GB/s." in text


def test_rates_are_told_apart_by_threads():
    rates = tuple(Rate("onnxruntime", "fp32", n, 150.0 * n) for n in (1, 2))
    both = dataclasses.replace(
        LIMITS, rates=rates, bandwidths=(Bandwidth(1, 14.0), Bandwidth(2, 27.0))
    )
    text = " ".join(table(*PEERS, limits=both))
    assert "1 thread: onnxruntime fp32 150 GFLOP/s; memory 14.0 GB/s." in text
    assert "2 threads: onnxruntime fp32 300 GFLOP/s; memory 27.0 GB/s." in text


def test_every_line_fits_a_terminal():
    assert max(map(len, table(*PEERS, limits=LIMITS))) <= 80


@pytest.mark.parametrize("absent", ["over traced", "of limit", "agreement"])
def test_results_that_are_held_against_nothing_have_no_second_table(absent):
    assert not any(absent in line for line in table(result("eager"), result("onnxruntime")))


def test_without_limits_there_is_no_column_of_them():
    bare = [dataclasses.replace(r, limit_ms=None, limit_share=None) for r in PEERS]
    lines = table(*bare)
    assert any("over traced" in line for line in lines)
    assert not any("of limit" in line for line in lines)
