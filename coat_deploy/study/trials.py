"""The trials of a study, several at a time, each result kept as soon as it is there."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from coat_deploy.data.options import DataOptions
from coat_deploy.errors import RepositoryError, UsageError
from coat_deploy.measure.latency import append_records
from coat_deploy.study.cells import Cell
from coat_deploy.study.trial import Trial, run_trial
from coat_deploy.train.recipe import Recipe

MAX_RECORD_BYTES = 64 << 20

Result = dict[str, Any]


def plan_trials(
    cells: Sequence[Cell], recipe: Recipe, seeds: int, source: str, options: DataOptions
) -> list[Trial]:
    """Return a trial for every cell and seed, seed by seed, so that a stopped study is even."""
    return [
        Trial(cell, replace(recipe, seed=seed), source, options)
        for seed in range(recipe.seed, recipe.seed + seeds)
        for cell in cells
    ]


def run_trials(
    trials: Sequence[Trial], jobs: int, record: Path | None, tell: Callable[[Result], None]
) -> list[Result]:
    """Return the results of all trials, in their order; those in `record` are not run again.

    jobs: processes at a time, of one thread each: two of one thread get more out of two cores
        than one of two. `tell` is called with every new result, in this thread.
    Raises: UsageError, ImageError, TrainingError as training does; RepositoryError for a record
        that cannot be read or written.
    """
    known = {result["key"]: result for result in read_record(record)} if record else {}
    wanted = [trial for trial in trials if trial.key() not in known]
    if jobs < 1:
        raise UsageError(f"jobs: must be 1 or more (got {jobs}).")
    # Spawned: threads of PyTorch do not survive a fork.
    pool = ProcessPoolExecutor(min(jobs, len(wanted) or 1), mp_context=get_context("spawn"))
    try:
        futures = [pool.submit(run_trial, trial, 1) for trial in wanted]
        for future in as_completed(futures):
            result = future.result()
            known[result["key"]] = result
            if record:
                append_records(record, [json.dumps(result, allow_nan=False)])
            tell(result)
    except BaseException:
        for process in list(getattr(pool, "_processes", {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [known[trial.key()] for trial in trials]


def read_record(path: Path) -> Iterator[Result]:
    """Yield the results in a record; nothing where there is none. Raises RepositoryError."""
    if not path.exists():
        return
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError(f"larger than {MAX_RECORD_BYTES} bytes")
        for line in path.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if not isinstance(result, dict):
                raise ValueError(f"no object: {line:.40}")
            if isinstance(result.get("key"), str):
                yield result
    except (OSError, ValueError) as error:
        raise RepositoryError(
            f"{path}: not a record that can be read ({error}). Name another file."
        ) from error
