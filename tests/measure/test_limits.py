import functools
import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from coat_deploy.backends.select import PRECISIONS
from coat_deploy.errors import RunnerError
from coat_deploy.machine import Machine
from coat_deploy.measure import limits
from coat_deploy.measure.latency import ColdWarm, Latency
from coat_deploy.measure.limits import BYTES_A_WEIGHT, Bandwidth, Limits, Rate, Work

WORK = Work(macs=1_000_000_000, weights=1_000_000, size=(10, 20))
FAST = Bandwidth(None, 1e6)
"""Memory so fast that it never limits."""


def result(target: str = "onnxruntime", precision: str = "fp32", **changes: Any) -> Latency:
    same = dict(form="authored", sha256=None, p90_ms=1.0, p99_ms=1.0, images_per_second=1.0)
    none = dict.fromkeys(
        ("ratio", "ratio_interval", "baseline", "file_evicted", "peak_memory_mib")
        + ("peak_memory_source", "memory_before_load_mib")
    )
    rest = dict(
        name=target, batch=1, size=(10, 20), threads=None, p50_ms=100.0,
        median_interval_ms=(1.0, 1.0), load_ms=ColdWarm(1, 1), first_run_ms=ColdWarm(1, 1),
        iterations=6, rounds=6, stopped="budget",
    )  # fmt: skip
    return Latency(target=target, precision=precision, **{**same, **none, **rest, **changes})


def test_the_limit_is_two_operations_a_mac_at_the_rate_of_products() -> None:
    found = Limits(WORK, (Rate("onnxruntime", "fp32", None, 100.0),), (FAST,))
    assert found.limit_ms(result()) == pytest.approx(20.0)  # 2e9 / 100e9 s


def test_a_batch_has_the_products_of_all_its_images() -> None:
    found = Limits(WORK, (Rate("onnxruntime", "fp32", None, 100.0),), (FAST,))
    assert found.limit_ms(result(batch=8)) == pytest.approx(160.0)


def test_the_limit_is_memory_where_reading_takes_longer() -> None:
    rates = (Rate("onnxruntime", "fp32", None, 1e9),)
    found = Limits(WORK, rates, (Bandwidth(None, 1.0),))
    images = 2 * 3 * 10 * 20 * 4
    assert found.limit_ms(result(batch=2)) == pytest.approx((4_000_000 + images) / 1e6)


@pytest.mark.parametrize(("precision", "weight"), [("fp32", 4), ("bf16", 2), ("int8", 1)])
def test_weights_are_as_wide_as_the_precision_and_images_stay_floats(
    precision: str, weight: int
) -> None:
    assert WORK.least_bytes(3, precision) == 1_000_000 * weight + 3 * 3 * 200 * 4


def test_every_precision_of_every_target_has_a_width() -> None:
    assert set(itertools.chain.from_iterable(PRECISIONS.values())) <= set(BYTES_A_WEIGHT)


def test_the_rate_is_that_of_the_same_runtime_precision_and_threads() -> None:
    rates = (
        Rate("openvino", "fp32", None, 400.0),
        Rate("onnxruntime", "bf16", None, 800.0),
        Rate("onnxruntime", "fp32", 1, 50.0),
        Rate("onnxruntime", "fp32", None, 200.0),
    )
    found = Limits(WORK, rates, (FAST, Bandwidth(1, 1e6)))
    assert found.limit_ms(result()) == pytest.approx(10.0)
    assert found.limit_ms(result(threads=1)) == pytest.approx(40.0)


def test_a_target_without_a_rate_is_held_against_the_fastest_of_its_precision() -> None:
    rates = (
        Rate("onnxruntime", "fp32", None, 200.0),
        Rate("openvino", "fp32", None, 400.0),
        Rate("openvino", "bf16", None, 2000.0),
    )
    assert Limits(WORK, rates, (FAST,)).limit_ms(result("eager")) == pytest.approx(5.0)


def test_without_a_rate_of_its_precision_a_result_has_no_limit() -> None:
    found = Limits(WORK, (Rate("openvino", "bf16", None, 2000.0),), (FAST,))
    (applied,) = found.apply([result()])
    assert (applied.limit_ms, applied.limit_share) == (None, None)


def test_the_share_is_the_limit_over_the_median() -> None:
    found = Limits(WORK, (Rate("onnxruntime", "fp32", None, 100.0),), (FAST,))
    (applied,) = found.apply([result(p50_ms=40.0)])
    assert applied.limit_ms == pytest.approx(20.0)
    assert applied.limit_share == pytest.approx(0.5)


def test_limits_are_json_with_their_documented_keys() -> None:
    found = Limits(WORK, (Rate("onnxruntime", "fp32", 2, 100.0),), (Bandwidth(2, 20.0),))
    assert found.to_json() == {
        "work": {"macs": 1_000_000_000, "weights": 1_000_000, "size": [10, 20]},
        "rates": [{"target": "onnxruntime", "precision": "fp32", "threads": 2, "gflops": 100.0}],
        "bandwidths": [{"threads": 2, "gb_per_s": 20.0}],
    }


def test_a_rate_is_never_above_what_the_steps_took(fake: ModuleType) -> None:
    load = functools.partial(fake.load, "gemm", 20)
    rate = limits.measure_rate(load, np.zeros((1, 3, 4, 4), np.float32), 2_000_000_000)
    assert 0 < rate <= 100  # 2e9 operations in at least 20 ms


def test_a_rate_that_cannot_be_measured_says_why(fake: ModuleType) -> None:
    load = functools.partial(fake.load, "gemm", fail_at=0)
    with pytest.raises(RunnerError, match="load: ValueError: the artifact is not to my taste"):
        limits.measure_rate(load, np.zeros((1, 3, 4, 4), np.float32), 1)


def test_a_rate_that_takes_too_long_is_given_up(fake: ModuleType) -> None:
    load = functools.partial(fake.load, "gemm", fail_at=1, die="hang")
    with pytest.raises(RunnerError, match="no answer within 1 s"):
        limits.measure_rate(load, np.zeros((1, 3, 4, 4), np.float32), 1, timeout_s=1)


def test_bandwidth_is_that_of_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = itertools.cycle([0.5, 0.25, 1.0])
    clock, now = [], 0.0
    for _ in range(limits.PASSES):
        clock += [now, now := now + next(passes)]
    monkeypatch.setattr(limits.time, "perf_counter", iter(clock).__next__)
    assert limits.measure_bandwidth(2, 4) == pytest.approx(4 * 2**20 / 0.25 / 1e9)


def machine(memory_mib: int | None) -> Machine:
    return Machine("cpu", 2, 2, None, (), memory_mib, "Linux", "3.11", {})


@pytest.mark.parametrize(
    ("cache_mib", "memory_mib", "swept"),
    [
        (None, 64_000, limits.LEAST_MIB),
        (8.0, 64_000, limits.LEAST_MIB),
        (128.0, 64_000, 512),
        (480.0, 64_000, limits.MOST_MIB),
        (128.0, 800, 200),
        (480.0, None, limits.MOST_MIB // 4),
    ],
)
def test_what_is_swept_leaves_the_caches_and_not_the_memory(
    monkeypatch: pytest.MonkeyPatch, cache_mib: float | None, memory_mib: int | None, swept: int
) -> None:
    monkeypatch.setattr(limits, "largest_cache_mib", lambda: cache_mib)
    assert limits.sweep_mib(machine(memory_mib)) == swept
