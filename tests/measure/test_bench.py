import dataclasses
import functools
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from coat_deploy.errors import RunnerError, UsageError
from coat_deploy.measure.bench import BenchOptions, BenchReport, Contender, bench
from coat_deploy.measure.latency import Latency
from coat_deploy.measure.page_cache import evict

HERE = Path(__file__).parent
LINUX = sys.platform == "linux"
QUICK = BenchOptions(
    warmup_iterations=1, warmup_s=0, budget_s=0, min_rounds=6, slice_ms=1, timeout_s=30
)


def pixels(batch: int, size: tuple[int, int]) -> np.ndarray:
    return np.zeros((batch, 3, *size), np.float32)


def contender(
    fake: ModuleType, name: str, ms: float = 0.2, *, batch: int = 1, **how: Any
) -> Contender:
    file = how.pop("file", None)
    return Contender(
        name=name,
        target="fake",
        precision="fp32",
        form="plain",
        batch=batch,
        size=(8, 12),
        threads=2,
        file=file,
        sha256="0" * 64,
        load=functools.partial(fake.load, name, ms, **how),
    )


def by_name(report: BenchReport) -> dict[str, Latency]:
    return {result.name: result for result in report.results}


@pytest.fixture(scope="module")
def compared(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> BenchReport:
    """A contender that sleeps 6 ms, one that sleeps 2 ms, in two batches."""
    file = tmp_path_factory.mktemp("artifact") / "net.onnx"
    file.write_bytes(bytes(100_000))
    contenders = [
        contender(fake, "slow", 6, load_ms=120),
        contender(fake, "fast", 2, file=file),
        contender(fake, "slow", 4, batch=4),
    ]
    options = dataclasses.replace(QUICK, baseline="slow", slice_ms=12)
    return bench(contenders, pixels, options)


def test_the_ratio_is_the_baseline_divided_by_the_contender(compared: BenchReport) -> None:
    fast = by_name(compared)["fast"]
    assert fast.baseline == "slow"
    assert fast.ratio is not None and fast.ratio_interval is not None
    assert 1.5 < fast.ratio < 4.5  # 3 by construction; sleeping is not exact
    assert fast.ratio_interval[0] <= fast.ratio <= fast.ratio_interval[1]
    assert fast.ratio == compared.results[0].p50_ms / fast.p50_ms


def test_the_baseline_of_every_batch_has_ratio_one(compared: BenchReport) -> None:
    ratios = [(r.batch, r.ratio, r.ratio_interval) for r in compared.results if r.name == "slow"]
    assert ratios == [(1, 1.0, (1.0, 1.0)), (4, 1.0, (1.0, 1.0))]


@pytest.fixture(scope="module")
def with_peers(fake: ModuleType) -> dict[str, Latency]:
    """Of 6, 4 and 2 ms; two of them are held against another besides the baseline."""
    contenders = [
        contender(fake, "slow", 6),
        dataclasses.replace(contender(fake, "middle", 4), peer="absent"),
        dataclasses.replace(contender(fake, "fast", 2), peer="middle"),
    ]
    options = dataclasses.replace(QUICK, baseline="slow", slice_ms=12)
    return by_name(bench(contenders, pixels, options))


def test_a_contender_is_held_against_its_own_peer_too(with_peers: dict[str, Latency]) -> None:
    fast, middle = with_peers["fast"], with_peers["middle"]
    assert (fast.peer, fast.baseline) == ("middle", "slow")
    assert fast.peer_ratio == middle.p50_ms / fast.p50_ms
    assert fast.peer_ratio_interval is not None
    assert fast.peer_ratio_interval[0] <= fast.peer_ratio <= fast.peer_ratio_interval[1]


@pytest.mark.parametrize("name", ["slow", "middle"])
def test_without_a_peer_or_with_one_that_is_absent_there_is_no_second_ratio(
    with_peers: dict[str, Latency], name: str
) -> None:
    found = with_peers[name]
    assert (found.peer, found.peer_ratio, found.peer_ratio_interval) == (None, None, None)


def test_results_keep_the_order_of_the_contenders(compared: BenchReport) -> None:
    assert [(r.name, r.batch) for r in compared.results] == [("slow", 1), ("fast", 1), ("slow", 4)]


def test_throughput_counts_images_not_batches(compared: BenchReport) -> None:
    batched = compared.results[2]
    assert batched.images_per_second == pytest.approx(4000 / batched.p50_ms)


def test_the_cold_load_is_told_from_the_warm_one(compared: BenchReport) -> None:
    load_ms = compared.results[0].load_ms
    assert load_ms.cold >= 120 > load_ms.warm


def test_times_are_at_least_what_the_runner_slept(compared: BenchReport) -> None:
    slow = compared.results[0]
    assert 6 <= slow.median_interval_ms[0] <= slow.p50_ms <= slow.median_interval_ms[1]
    assert slow.p50_ms <= slow.p90_ms <= slow.p99_ms
    assert slow.first_run_ms.cold >= 6


def test_a_faster_contender_runs_more_often_a_slice(compared: BenchReport) -> None:
    slow, fast, _ = compared.results
    assert slow.rounds == fast.rounds == 6
    assert slow.iterations < fast.iterations


def test_the_report_is_json_with_its_documented_keys(compared: BenchReport) -> None:
    document = json.loads(json.dumps(compared.to_json()))
    assert set(document) == {"results", "failures", "options", "machine"}
    assert set(document["results"][0]) >= {
        *("target", "precision", "form", "batch", "size", "threads", "sha256"),
        *("p50_ms", "p90_ms", "p99_ms", "median_interval_ms", "images_per_second"),
        *("peak_memory_mib", "load_ms", "first_run_ms", "ratio", "ratio_interval", "baseline"),
        *("iterations", "rounds", "stopped"),
    }
    assert document["results"][0]["size"] == [8, 12]
    assert set(document["results"][0]["load_ms"]) == {"cold", "warm"}


def test_only_a_contender_with_a_file_tells_whether_it_was_evicted(compared: BenchReport) -> None:
    slow, fast, _ = compared.results
    assert slow.file_evicted is None
    assert fast.file_evicted in (True, False)


def test_a_spent_budget_ends_after_the_least_rounds(fake: ModuleType) -> None:
    options = dataclasses.replace(QUICK, stability=0)
    (result,) = bench([contender(fake, "a")], pixels, options).results
    assert (result.stopped, result.rounds) == ("budget", 6)


def test_narrow_intervals_end_before_the_budget(fake: ModuleType) -> None:
    options = dataclasses.replace(QUICK, stability=1e9, budget_s=60, min_rounds=8)
    (result,) = bench([contender(fake, "a")], pixels, options).results
    assert (result.stopped, result.rounds) == ("stable", 8)


@pytest.fixture(scope="module")
def steps(
    fake: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, int, int, int]]:
    """Every step of three contenders of one bench with seed 3: name, process, start, end."""
    log = tmp_path_factory.mktemp("log") / "steps"
    contenders = [contender(fake, name, 2, log=log) for name in "abc"]
    bench(contenders, pixels, dataclasses.replace(QUICK, seed=3))
    lines = [line.split() for line in log.read_text().splitlines()]
    return [(name, int(pid), int(start), int(end)) for name, pid, start, end in lines]


def test_only_one_contender_works_at_a_time(steps: list[tuple[str, int, int, int]]) -> None:
    assert all(a[3] <= b[2] for a, b in itertools.pairwise(steps))


def test_every_contender_has_a_process_of_its_own(steps: list[tuple[str, int, int, int]]) -> None:
    assert len({pid for _, pid, _, _ in steps}) == 3
    assert len({(name, pid) for name, pid, _, _ in steps}) == 3


def test_rounds_hold_every_contender_once_in_the_order_of_the_seed(
    steps: list[tuple[str, int, int, int]],
) -> None:
    # Each loads, runs once and warms up once; then rounds of one iteration; then a warm start.
    names = "".join(name for name, *_ in steps)
    generator = np.random.default_rng(3)
    rounds = ["".join("abc"[i] for i in generator.permutation(3)) for _ in range(6)]
    assert names == "aabbcc" + "".join(rounds) + "abc"


@pytest.fixture(scope="module")
def with_failures(fake: ModuleType) -> BenchReport:
    contenders = [
        contender(fake, "load raises", fail_at=0),
        contender(fake, "run raises", fail_at=5),
        contender(fake, "exits", fail_at=5, die="exit"),
        contender(fake, "asks to exit", fail_at=0, die="sys.exit"),
        contender(fake, "killed", fail_at=1, die="kill"),
        contender(fake, "second load raises", fail_at=-1),
        contender(fake, "sound"),
    ]
    return bench(contenders, pixels, dataclasses.replace(QUICK, baseline="exits"))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("load raises", "load: ValueError: the artifact is not to my taste"),
        ("run raises", "run: ValueError: the artifact is not to my taste"),
        ("exits", "its process ended with exit status 7."),
        ("asks to exit", "load: SystemExit: no licence"),
        ("second load raises", "second load: ValueError: the artifact is not to my taste"),
    ],
)
def test_a_failed_contender_says_why_in_one_line(
    with_failures: BenchReport, name: str, error: str
) -> None:
    assert {failure.name: failure.error for failure in with_failures.failures}[name] == error


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_killed_contender_names_the_signal(with_failures: BenchReport) -> None:
    errors = {failure.name: failure.error for failure in with_failures.failures}
    assert errors["killed"].startswith("its process was killed by SIGKILL.")


def test_the_others_go_on_when_some_fail(with_failures: BenchReport) -> None:
    (sound,) = with_failures.results
    assert (sound.name, sound.rounds) == ("sound", 6)


def test_without_its_baseline_a_result_has_no_ratio(with_failures: BenchReport) -> None:
    (sound,) = with_failures.results
    assert (sound.ratio, sound.ratio_interval, sound.baseline) == (None, None, None)


def test_a_bench_in_which_all_fail_raises_and_names_each(fake: ModuleType) -> None:
    contenders = [contender(fake, "one", fail_at=0), contender(fake, "two", fail_at=0)]
    with pytest.raises(RunnerError, match=r"every contender failed.*one \(batch 1, 8x12.*two \("):
        bench(contenders, pixels, QUICK)


def test_a_worker_that_is_idle_ends_by_itself(fake: ModuleType, tmp_path: Path) -> None:
    """So that what its runtime holds, as shared semaphores, is freed and not leaked."""
    farewell = tmp_path / "farewell"
    bench([contender(fake, "a", farewell=farewell)], pixels, QUICK)
    assert farewell.exists()


def test_a_contender_that_hangs_is_ended(fake: ModuleType) -> None:
    options = dataclasses.replace(QUICK, timeout_s=1)
    with pytest.raises(RunnerError, match="no answer within 1 s; ended"):
        bench([contender(fake, "hangs", fail_at=4, die="hang")], pixels, options)


def test_a_load_that_cannot_be_imported_in_the_worker_is_a_failure(
    fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vanishing.py").write_text("def load(): ...")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        vanishing = importlib.import_module("vanishing")
    lost = dataclasses.replace(contender(fake, "lost"), load=vanishing.load)
    report = bench([lost, contender(fake, "sound")], pixels, QUICK)
    assert report.failures[0].error == "load: ModuleNotFoundError: No module named 'vanishing'"


@pytest.mark.skipif(not LINUX, reason="ru_maxrss means something else elsewhere")
def test_peak_memory_is_the_contenders_and_not_its_parents(fake: ModuleType) -> None:
    ballast = np.ones(200 << 17)  # 200 MiB here that a worker must not be charged with
    (result,) = bench([contender(fake, "a", memory_mib=50)], pixels, QUICK).results
    assert ballast.size
    assert result.peak_memory_mib is not None and result.memory_before_load_mib is not None
    assert 50 <= result.peak_memory_mib - result.memory_before_load_mib < 80
    assert result.peak_memory_mib < 200
    assert result.peak_memory_source == "VmHWM"


def test_what_a_runtime_prints_stays_out_of_stdout(
    fake: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    bench([contender(fake, "a")], pixels, QUICK)
    out, err = capfd.readouterr()
    assert out == ""
    assert "a runtime that talks" in err


def test_progress_never_goes_back_and_names_the_contender(fake: ModuleType) -> None:
    seen: list[tuple[str, float]] = []
    contenders = [contender(fake, "a"), contender(fake, "a", batch=2)]
    bench(contenders, pixels, QUICK, lambda message, done: seen.append((message, done)))
    shares = [done for _, done in seen]
    assert shares == sorted(shares)
    assert shares[0] >= 0 and shares[-1] <= 1
    assert seen[0][0].startswith("a (batch 1, 8x12, 2 threads)")


def test_an_unknown_baseline_names_the_nearest(fake: ModuleType) -> None:
    options = dataclasses.replace(QUICK, baseline="slw")
    with pytest.raises(UsageError, match="Did you mean 'slow'"):
        bench([contender(fake, "slow")], pixels, options)


def test_two_contenders_of_one_name_are_refused(fake: ModuleType) -> None:
    with pytest.raises(UsageError, match="two contenders are called a "):
        bench([contender(fake, "a"), contender(fake, "a")], pixels, QUICK)


@pytest.mark.parametrize(
    "bad", [{"min_rounds": 5}, {"budget_s": -1}, {"slice_ms": 0}, {"stability": float("nan")}]
)
def test_options_that_cannot_be_are_refused(bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(UsageError, match=name):
        dataclasses.replace(QUICK, **bad)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_a_file_that_lives_in_memory_is_not_called_evicted() -> None:
    file = Path(f"/dev/shm/coat-deploy-{os.getpid()}.onnx")
    file.write_bytes(b"weights")
    try:
        assert not evict(file)
    finally:
        file.unlink()


def test_evicting_leaves_the_bytes_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "net.xml").write_bytes(b"graph")
    (tmp_path / "net.bin").write_bytes(bytes(range(256)) * 64)
    evict(tmp_path / "net.xml")
    assert (tmp_path / "net.xml").read_bytes() == b"graph"
    assert (tmp_path / "net.bin").read_bytes() == bytes(range(256)) * 64


INTERRUPTED = """
import functools, sys
from pathlib import Path
import numpy as np
import fake_runner
from coat_deploy.measure.bench import BenchOptions, Contender, bench

if __name__ == "__main__":
    load = functools.partial(fake_runner.load, "a", 1, log=Path(sys.argv[1]))
    a = Contender("a", "fake", "fp32", "plain", 1, (8, 8), load)
    bench([a], lambda b, s: np.zeros((b, 3, *s), np.float32), BenchOptions(stability=0))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_an_interrupt_ends_the_workers_and_only_the_bench_speaks_of_it(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(INTERRUPTED)
    running = subprocess.Popen(
        [sys.executable, script, log],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the interrupt reaches the whole group, as from a terminal
    )
    with running:
        deadline = time.monotonic() + 30
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=15)
    assert errors.count("KeyboardInterrupt") == 1
    worker = int(log.read_text().split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
