import json
from dataclasses import replace

import pytest

from coat_deploy.data.options import DataOptions
from coat_deploy.errors import RepositoryError, UsageError
from coat_deploy.measure.latency import append_records
from coat_deploy.network.variants import get_variant
from coat_deploy.study.cells import Cell
from coat_deploy.study.trials import plan_trials, read_record, run_trials
from coat_deploy.train.recipe import get_preset

CELLS = [
    Cell("part", "with", get_variant("coat_lite_toy")),
    Cell("part", "without", get_variant("coat_lite_toy"), {"crpe": False}),
]
RECIPE = get_preset("small", "digits").replace({"epochs": 1, "warmup_epochs": 0})


def planned(seeds=1, recipe=RECIPE):
    return plan_trials(CELLS, recipe, seeds, "digits", DataOptions())


def test_every_cell_is_trained_once_a_seed_and_seeds_come_in_turn():
    trials = planned(seeds=2)
    assert [(t.recipe.seed, t.cell.name) for t in trials] == [
        (0, "with"), (0, "without"), (1, "with"), (1, "without"),
    ]  # fmt: skip


def test_keys_tell_apart_what_decides_a_result_and_nothing_else():
    keys = [trial.key() for trial in planned(seeds=2)]
    assert len(set(keys)) == 4
    assert [t.key() for t in planned(seeds=2, recipe=replace(RECIPE, workers=1))] == keys
    assert not {t.key() for t in planned(seeds=2, recipe=replace(RECIPE, erase=0.1))} & set(keys)


@pytest.mark.slow
def test_results_are_recorded_and_not_computed_again(tmp_path):
    record, told = tmp_path / "study.jsonl", []
    results = run_trials(planned(), jobs=2, record=record, tell=told.append)
    assert [result["cell"] for result in results] == ["with", "without"]
    assert {result["images"] for result in results} == {359}
    assert all(0.2 < result["top1"] <= 1 for result in results)
    assert sorted(json.dumps(line) for line in told) == sorted(record.read_text().splitlines())

    def not_again(result):
        raise AssertionError(result)

    assert run_trials(planned(), jobs=2, record=record, tell=not_again) == results


def test_error_of_a_trial_ends_the_study(tmp_path):
    trials = plan_trials(CELLS, RECIPE, 1, str(tmp_path / "nowhere"), DataOptions())
    with pytest.raises(UsageError, match="nowhere"):
        run_trials(trials, jobs=2, record=None, tell=lambda result: None)


def test_tables_in_a_record_are_no_trials(tmp_path):
    record = tmp_path / "study.jsonl"
    append_records(record, ['{"key": "a", "top1": 0.5}', '{"ablation": []}'])
    assert list(read_record(record)) == [{"key": "a", "top1": 0.5}]


def test_damaged_record_is_refused(tmp_path):
    record = tmp_path / "study.jsonl"
    record.write_text('{"key": "a"}\n{"key"', encoding="utf-8")
    with pytest.raises(RepositoryError, match="study.jsonl"):
        list(read_record(record))
