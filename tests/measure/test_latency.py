import dataclasses
import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from coat_deploy.errors import RepositoryError
from coat_deploy.machine import describe
from coat_deploy.measure.latency import (
    MIN_ROUNDS,
    ColdWarm,
    Failure,
    Latency,
    append_records,
    interval_over_rounds,
    is_stable,
    median_interval,
    percentiles,
    ratio_of_medians,
    record_lines,
)

RESULT = Latency(
    name="onnxruntime-fp32",
    target="onnxruntime",
    precision="fp32",
    form="fold",
    batch=8,
    size=(224, 320),
    threads=None,
    sha256="ab" * 32,
    p50_ms=20.0,
    p90_ms=21.0,
    p99_ms=25.0,
    median_interval_ms=(19.5, 20.5),
    images_per_second=400.0,
    ratio=1.5,
    ratio_interval=(1.4, 1.6),
    baseline="eager-fp32",
    load_ms=ColdWarm(100.0, 40.0),
    first_run_ms=ColdWarm(30.0, 25.0),
    file_evicted=True,
    peak_memory_mib=150.0,
    peak_memory_source="VmHWM",
    memory_before_load_mib=30.0,
    iterations=700,
    rounds=14,
    stopped="stable",
)
DATE = datetime(2031, 5, 4, 3, 2, 1, 999, tzinfo=UTC)


def test_percentiles_of_0_to_100_are_their_own_names() -> None:
    samples = np.random.default_rng(0).permutation(101).astype(np.float64)
    assert dataclasses.astuple(percentiles(samples)) == (50, 90, 99)


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # Ranks of the 95 % interval in the usual tables of the sign test.
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (20, 6, 15), (50, 18, 33), (100, 40, 61)],
)
def test_the_median_interval_takes_the_tabled_ranks(count: int, low: int, high: int) -> None:
    interval = median_interval(np.arange(count, 0, -1.0))
    assert (interval.low, interval.high) == (low, high)


def test_the_median_interval_reports_its_exact_confidence() -> None:
    assert median_interval(np.arange(10.0)).confidence == pytest.approx(1 - 2 * 11 / 1024)


def test_a_confidence_that_is_met_exactly_is_kept() -> None:
    interval = median_interval(np.arange(5.0), confidence=1 - 2**-4)
    assert (interval.low, interval.high) == (0, 4)
    assert interval.confidence == pytest.approx(0.9375)


def test_too_few_samples_give_the_extremes_with_less_confidence() -> None:
    interval = median_interval(np.array([3.0, 1.0, 2.0]))
    assert (interval.low, interval.high) == (1, 3)
    assert interval.confidence == pytest.approx(0.75)


def test_one_sample_gives_no_confidence() -> None:
    assert median_interval(np.array([3.0])).confidence == 0


def test_the_fewest_rounds_are_just_enough_for_95_per_cent() -> None:
    assert median_interval(np.arange(MIN_ROUNDS * 1.0)).confidence >= 0.95
    assert median_interval(np.arange(MIN_ROUNDS - 1.0)).confidence < 0.95


def test_many_samples_do_not_underflow() -> None:
    interval = median_interval(np.arange(1.0, 10_001.0))
    half_width = 1.959964 * math.sqrt(10_000) / 2  # the binomial's normal limit
    assert interval.low == pytest.approx(5000 - half_width, abs=2)
    assert interval.high == pytest.approx(5001 + half_width, abs=2)


@pytest.mark.parametrize("count", [7, 12, 25])
def test_the_median_interval_covers_a_skewed_median_as_often_as_it_says(count: int) -> None:
    generator = np.random.default_rng(count)
    trials = generator.exponential(size=(4000, count))
    intervals = [median_interval(samples) for samples in trials]
    covered = np.mean([i.low <= math.log(2) <= i.high for i in intervals])
    assert covered == pytest.approx(intervals[0].confidence, abs=0.012)


def test_samples_are_stable_when_the_half_width_is_within_the_share() -> None:
    samples = np.array([98.0, 99, 100, 100, 101, 102])  # half width 2 around 100
    assert is_stable(samples, 0.02)
    assert not is_stable(samples, 0.0199)


def test_too_few_samples_are_never_stable() -> None:
    assert not is_stable(np.full(5, 100.0), 0.5)


def test_timings_of_one_slice_do_not_count_as_independent() -> None:
    # 8 rounds, each of one speed: a thousand copies of a round teach nothing about the others.
    speeds = np.array([10.0, 11, 12, 13, 14, 15, 16, 17])
    interval = interval_over_rounds([np.full(1000, speed) for speed in speeds])
    assert (interval.low, interval.high) == (10, 17)


def test_the_interval_over_rounds_holds_the_median_of_all() -> None:
    rounds = [np.array([1.0])] * 9 + [np.full(100, 5.0)]
    interval = interval_over_rounds(rounds)
    assert interval.low <= 5 <= interval.high


def test_half_the_time_is_a_ratio_of_exactly_two() -> None:
    slow = list(np.random.default_rng(0).normal(20, 1, (10, 7)))
    ratio = ratio_of_medians(slow, [samples / 2 for samples in slow], np.random.default_rng(1))
    assert (ratio.value, ratio.interval.low, ratio.interval.high) == (2, 2, 2)


def test_the_ratio_is_that_of_the_medians_of_all_timings() -> None:
    generator = np.random.default_rng(2)
    a = list(generator.normal(20, 1, (9, 5)))
    b = list(generator.normal(15, 1, (9, 8)))
    ratio = ratio_of_medians(a, b, generator)
    assert ratio.value == np.median(np.concatenate(a)) / np.median(np.concatenate(b))
    assert ratio.interval.low < ratio.value < ratio.interval.high


def test_what_slows_both_sides_of_a_round_cancels() -> None:
    generator = np.random.default_rng(3)
    moods = generator.uniform(1, 3, 20)  # the machine's speed wanders by a factor of 3
    a = [20 * mood * generator.normal(1, 0.01, 30) for mood in moods]
    b = [10 * mood * generator.normal(1, 0.01, 30) for mood in moods]
    paired = ratio_of_medians(a, b, generator).interval
    shuffled = ratio_of_medians(a, [b[i] for i in generator.permutation(20)], generator).interval
    assert paired.low < 2 < paired.high
    assert paired.high - paired.low < 0.1 < shuffled.high - shuffled.low


def test_the_ratio_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        a = list(generator.gamma(20, 1, (15, 4)))
        b = list(generator.gamma(20, 0.5, (15, 4)))
        interval = ratio_of_medians(a, b, generator, resamples=300).interval
        covered += interval.low <= 2 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval() -> None:
    rounds = list(np.random.default_rng(5).normal(20, 1, (10, 5)))
    others = list(np.random.default_rng(6).normal(20, 1, (10, 5)))
    first, second = (
        ratio_of_medians(rounds, others, np.random.default_rng(7), resamples=100) for _ in range(2)
    )
    assert first == second


def test_json_of_a_result_survives_a_round_trip() -> None:
    document = RESULT.to_json()
    assert json.loads(json.dumps(document)) == document
    assert document["size"] == [224, 320]
    assert document["load_ms"] == {"cold": 100.0, "warm": 40.0}


def test_json_of_a_failure_names_the_error() -> None:
    failure = Failure("a", "eager", "fp32", "plain", 1, (8, 8), None, "load: no memory")
    assert failure.to_json()["error"] == "load: no memory"
    assert failure.to_json()["size"] == [8, 8]


def test_a_record_is_one_line_complete_in_itself() -> None:
    context = {"model": "coat_tiny", "commit": "abc"}
    lines = record_lines(
        [RESULT, RESULT], describe(), command="coat-deploy bench", date=DATE, context=context
    )
    assert len(lines) == 2 and not any("\n" in line for line in lines)
    record = json.loads(lines[0])
    assert record["date"] == "2031-05-04T03:02:01+00:00"
    assert (record["command"], record["model"]) == ("coat-deploy bench", "coat_tiny")
    assert record["p50_ms"] == 20.0
    assert record["machine"]["versions"]["coat-deploy"]


def test_records_are_added_after_those_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    append_records(file, ["1", "2"])
    append_records(file, ["3"])
    assert file.read_text() == "1\n2\n3\n"


def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "records.jsonl"
    append_records(file, ["1"])
    write = os.write
    monkeypatch.setattr(os, "write", lambda number, data: write(number, data[:3]))
    with pytest.raises(RepositoryError, match=r"records\.jsonl: records were not written"):
        append_records(file, ["a long record"])
    assert file.read_text() == "1\n"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="No such file or directory"):
        append_records(tmp_path / "nowhere" / "records.jsonl", ["1"])
