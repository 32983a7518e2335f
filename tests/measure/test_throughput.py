import dataclasses
import functools
import itertools
import json
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from coat_deploy.errors import RunnerError, UsageError
from coat_deploy.machine import describe
from coat_deploy.measure.bench import BenchOptions, Contender
from coat_deploy.measure.latency import record_lines
from coat_deploy.measure.search import ThroughputOptions, stream_counts, worth_growing
from coat_deploy.measure.throughput import Throughput, ThroughputReport, throughput

TURNS = BenchOptions(
    warmup_iterations=1, warmup_s=0, budget_s=0, min_rounds=6, slice_ms=1, timeout_s=30
)
QUICK = ThroughputOptions(batches=(1, 2, 4), search_s=0.02, turns=TURNS)


def pixels(batch: int, size: tuple[int, int]) -> np.ndarray:
    return np.zeros((batch, 3, *size), np.float32)


def target(
    fake: ModuleType, name: str, ms: float = 0.2, *, threads: int = 2, **how: Any
) -> list[Contender]:
    """A contender for each number of streams."""
    load = functools.partial(fake.load, name, ms, **how)
    contender = Contender(
        name, "fake", "fp32", "plain", 1, (8, 12), load, threads=threads, sha256="0" * 64
    )
    counts = stream_counts(threads)
    return [dataclasses.replace(contender, streams=count) for count in counts]


def by_name(report: ThroughputReport) -> dict[str, Throughput]:
    return {result.name: result for result in report.results}


@pytest.fixture(scope="module")
def compared(fake: ModuleType) -> ThroughputReport:
    """One that gains by streams alone, one by batches alone, one by neither; of 2 threads."""
    contenders = [
        *target(fake, "streams", 10, growth=1),
        *target(fake, "batches", 10, one_at_a_time=True),
        *target(fake, "neither", 10, growth=1, one_at_a_time=True),
    ]
    turns = dataclasses.replace(TURNS, baseline="neither")
    return throughput(contenders, pixels, dataclasses.replace(QUICK, turns=turns))


def test_streams_win_where_requests_do_not_slow_each_other(compared: ThroughputReport) -> None:
    best = by_name(compared)["streams"]
    assert (best.streams, best.threads_per_stream) == (2, 1)
    assert best.images_per_second == pytest.approx(200, rel=0.3)


def test_a_batch_wins_where_it_takes_no_longer_than_an_image(compared: ThroughputReport) -> None:
    best = by_name(compared)["batches"]
    assert best.batch == 4
    assert best.images_per_second == pytest.approx(400, rel=0.3)


def test_streams_that_cannot_run_at_once_gain_nothing(compared: ThroughputReport) -> None:
    tried = [t for t in by_name(compared)["batches"].tried if t.streams == 2 and t.batch == 1]
    assert tried[0].images_per_second == pytest.approx(100, rel=0.3)


def test_the_time_of_a_request_is_no_less_than_its_step(compared: ThroughputReport) -> None:
    # No more: who waits for whom is the lock's affair, which may starve one of two.
    for result in compared.results:
        assert 10 <= result.p50_ms <= result.p99_ms


def test_the_ratio_is_the_rate_over_that_of_the_baselines_best(compared: ThroughputReport) -> None:
    results = by_name(compared)
    for name in ("streams", "batches"):
        result = results[name]
        expected = result.images_per_second / results["neither"].images_per_second
        assert result.ratio == pytest.approx(expected)
        assert result.ratio_interval is not None
        assert 1 < result.ratio_interval[0] <= expected <= result.ratio_interval[1]
    assert (results["neither"].ratio, results["neither"].ratio_interval) == (1, (1, 1))


def test_the_interval_holds_the_rate(compared: ThroughputReport) -> None:
    for result in compared.results:
        low, high = result.images_per_second_interval
        assert low <= result.images_per_second <= high
        assert result.rounds == 6
        assert result.requests >= result.rounds  # of streams that share a lock one may starve


def test_all_that_was_tried_is_told_with_the_finalists_marked(compared: ThroughputReport) -> None:
    result = by_name(compared)["batches"]
    tried = [(t.streams, t.threads_per_stream, t.batch) for t in result.tried]
    assert tried == [(1, 2, 1), (1, 2, 2), (1, 2, 4), (2, 1, 1), (2, 1, 2), (2, 1, 4)]
    finals = {t.batch: t.final_images_per_second for t in result.tried if t.streams == 1}
    assert finals[1] is None and finals[2] is None  # a quarter and a half of the best
    best = [t.final_images_per_second for t in result.tried if t.final_images_per_second]
    assert max(best) == result.images_per_second
    assert 1 <= len(best) <= QUICK.finalists


def test_the_report_is_json_with_its_documented_keys(compared: ThroughputReport) -> None:
    document = json.loads(json.dumps(compared.to_json()))
    assert set(document) == {"results", "failures", "options", "machine"}
    assert document["results"][0]["kind"] == "throughput"
    assert document["results"][0]["size"] == [8, 12]
    assert document["results"][0]["tried"][0]["error"] is None
    assert document["options"]["batches"] == [1, 2, 4]
    assert document["options"]["baseline"] == "neither"


def test_a_record_is_complete_in_itself_and_of_its_kind(compared: ThroughputReport) -> None:
    lines = record_lines(
        compared.results, describe(), command="bench", date=datetime(2026, 1, 1, tzinfo=UTC)
    )
    records = [json.loads(line) for line in lines]
    assert [record["name"] for record in records] == ["streams", "batches", "neither"]
    assert {record["kind"] for record in records} == {"throughput"}
    assert all(record["machine"]["cpu"] and record["date"] for record in records)


def test_batches_stop_growing_after_two_that_are_slower(fake: ModuleType) -> None:
    slower = target(fake, "slower", 4, growth=2)
    options = dataclasses.replace(QUICK, batches=(1, 2, 4, 8, 16))
    (result,) = throughput(slower, pixels, options).results
    assert [(t.streams, t.batch) for t in result.tried] == [
        (streams, batch) for streams in (1, 2) for batch in (1, 2, 4)
    ]


@pytest.mark.parametrize(
    ("rates", "worth"),
    [
        ([100], True),
        ([100, 50], True),
        ([100, 50, 50], False),
        ([100, 94, 96], True),
        ([100, 94, 94], False),
        ([100, 90, 120], True),
        ([100, 96, 96, 96], True),
        ([50, 100, 90, 90], False),
    ],
)
def test_two_in_a_row_below_the_best_end_the_growth(rates: list[float], worth: bool) -> None:
    assert worth_growing(rates, 0.05) == worth


@pytest.mark.parametrize(("threads", "counts"), [(1, [1]), (2, [1, 2]), (12, [1, 2, 3, 4, 6, 12])])
def test_streams_share_the_threads_evenly(threads: int, counts: list[int]) -> None:
    assert stream_counts(threads) == counts


def test_a_batch_that_is_too_large_costs_only_itself(fake: ModuleType) -> None:
    small = target(fake, "small", 4, threads=1, largest_batch=2)
    options = dataclasses.replace(QUICK, batches=(1, 2, 4, 8))
    (result,) = throughput(small, pixels, options).results
    assert [t.batch for t in result.tried] == [1, 2, 4]
    assert result.tried[2].images_per_second is None
    assert result.tried[2].error is not None and "not to my taste" in result.tried[2].error
    assert result.batch == 2


def test_a_target_that_fails_says_why_and_the_others_go_on(fake: ModuleType) -> None:
    contenders = [
        *target(fake, "broken", threads=1, fail_at=0),
        *target(fake, "sound", 2, threads=1),
    ]
    turns = dataclasses.replace(TURNS, baseline="broken")
    report = throughput(contenders, pixels, dataclasses.replace(QUICK, turns=turns))
    (failure,) = report.failures
    assert (failure.name, failure.batch) == ("broken", 1)
    assert failure.error == "load: ValueError: the artifact is not to my taste"
    (sound,) = report.results
    assert (sound.name, sound.ratio, sound.baseline) == ("sound", None, None)


def test_a_process_that_dies_under_load_is_a_failure(fake: ModuleType) -> None:
    contenders = [
        *target(fake, "dies", fail_at=3, die="exit"),
        *target(fake, "sound", 2, threads=2)[:1],
    ]
    report = throughput(contenders, pixels, QUICK)
    assert [result.name for result in report.results] == ["sound"]
    assert report.failures[0].error == "its process ended with exit status 7."


def test_a_stream_that_hangs_is_ended(fake: ModuleType) -> None:
    turns = dataclasses.replace(TURNS, timeout_s=1)
    hangs = target(fake, "hangs", fail_at=3, die="hang")
    with pytest.raises(RunnerError, match="no answer within 1 s; ended"):
        throughput(hangs[1:], pixels, dataclasses.replace(QUICK, turns=turns))


def test_when_all_fail_each_is_named(fake: ModuleType) -> None:
    contenders = [*target(fake, "one", fail_at=0), *target(fake, "two", fail_at=0)]
    with pytest.raises(RunnerError, match=r"every contender failed. one: load: .*; two: load: "):
        throughput(contenders, pixels, QUICK)


def test_only_one_configuration_works_at_a_time(fake: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "steps"
    contenders = [c for name in "ab" for c in target(fake, name, 2, log=log)]
    throughput(contenders, pixels, dataclasses.replace(QUICK, batches=(1,), margin=1))
    steps = [line.split() for line in log.read_text().splitlines()]
    spans: dict[str, list[tuple[int, int]]] = {}
    for _, pid, start, end in steps:
        spans.setdefault(pid, []).append((int(start), int(end)))
    assert len(spans) == 4 + 4  # each searched, and then once more as a finalist
    order = sorted((start, end, pid) for pid, mine in spans.items() for start, end in mine)
    for (_, end, pid), (start, _, other) in itertools.pairwise(order):
        assert pid == other or end <= start


def test_progress_never_goes_back_and_names_the_configuration(fake: ModuleType) -> None:
    seen: list[tuple[str, float]] = []
    options = dataclasses.replace(QUICK, batches=(1,))
    contenders = target(fake, "a", 2)
    throughput(contenders, pixels, options, lambda message, done: seen.append((message, done)))
    shares = [done for _, done in seen]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert [message for message, _ in seen[:2]] == ["a: 1 stream, batch 1", "a: 2 streams, batch 1"]
    assert seen[-1][0] == "finalists: round 6"


def test_an_unknown_baseline_names_the_nearest(fake: ModuleType) -> None:
    turns = dataclasses.replace(TURNS, baseline="slw")
    with pytest.raises(UsageError, match="Did you mean 'slow'"):
        throughput(target(fake, "slow"), pixels, dataclasses.replace(QUICK, turns=turns))


def test_contenders_of_other_threads_cannot_be_compared(fake: ModuleType) -> None:
    contenders = [*target(fake, "a", threads=1), *target(fake, "b", threads=2)]
    with pytest.raises(UsageError, match="cannot be compared"):
        throughput(contenders, pixels, QUICK)


def test_more_streams_than_threads_are_refused_with_both(fake: ModuleType) -> None:
    (contender,) = target(fake, "a", threads=1)
    with pytest.raises(UsageError, match="got 2 streams and 1 threads"):
        throughput([dataclasses.replace(contender, streams=2)], pixels, QUICK)


@pytest.mark.parametrize(
    "bad",
    [
        *({"batches": ()}, {"batches": (2, 1)}, {"batches": (0, 1)}, {"batches": (1, 1)}),
        *({"finalists": 0}, {"drop": -1}, {"search_s": float("nan")}, {"margin": -0.1}),
    ],
)
def test_options_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(UsageError, match=name):
        dataclasses.replace(QUICK, **bad)
