import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from coat_deploy import model as model_module
from coat_deploy import transaction
from coat_deploy.backends import eager
from coat_deploy.errors import RepositoryError, WeightsError
from coat_deploy.machine import describe
from coat_deploy.measure.quality import QualityMeter
from coat_deploy.model import CONFIG, MANIFEST, WEIGHTS, Model
from coat_deploy.network.coat import create_network
from coat_deploy.network.weights import read_safetensors
from coat_deploy.repository import read_labels
from coat_deploy.runner import LoadOptions
from coat_deploy.spec import WeightsRecord
from coat_deploy.train import finish
from coat_deploy.train.finish import CARD, METRICS, PICTURES, RECIPE, Story, write_model
from coat_deploy.train.plan import Outcome
from coat_deploy.train.progress import EpochReport
from coat_deploy.train.recipe import Recipe, read_recipe
from coat_deploy.train.start import plan_spec
from coat_deploy.train.state import read_weights

LABELS = ("coat", "hat | cap", "猫")
FILES = {CONFIG, WEIGHTS, MANIFEST, RECIPE, METRICS, CARD, *PICTURES}
VARIANTS = ["coat_lite_nano", "coat_nano", "coat_lite_tiny"]


def quality():
    meter = QualityMeter(len(LABELS))
    logits = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    logits[np.arange(60), np.arange(60) % 3] += 1
    meter.add(logits, np.arange(60) % 3)
    return meter.quality()


def story(recipe, epochs=2):
    reports = [
        EpochReport(e, epochs, 7 * e, 1 / e, 1e-3, 100.0 * e, 0.1, 0.01, 3.0 * e, 0.5, 0.9, 1.0)
        for e in range(1, epochs + 1)
    ]
    return Story("small", "/home/jo/photos", recipe, reports, describe(), 2, WeightsRecord("timm"))


def trained(toys, variant="coat_lite_toy", seed=0, **fields):
    """A spec, what came out of its training, and its story."""
    recipe = toys.recipe(size=64, **fields)
    spec = plan_spec(variant, LABELS, recipe)
    network = toys.network(variant, len(LABELS), seed)
    outcome = Outcome(read_weights(network), quality(), epoch=2, images=123, seconds=6.5)
    return spec, outcome, story(recipe)


@pytest.fixture(scope="module")
def written(toys, tmp_path_factory):
    """A model written, the spec and the outcome it is of, and the metrics it returned."""
    model = Model(tmp_path_factory.mktemp("models") / "clothes")
    spec, outcome, told = trained(toys, rotate=12.0)
    return Model(model.folder), spec, outcome, told, write_model(model, spec, outcome, told)


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_folder_holds_everything_and_nothing_else(written):
    model, *_ = written
    found = content(model.folder)
    assert found.keys() == FILES
    assert all(found.values())


def test_the_config_is_that_of_the_spec(written):
    model, spec, *_ = written
    assert model.spec == spec
    assert read_labels(model.spec) == LABELS


def test_the_weights_are_those_of_the_outcome_to_the_bit(written):
    model, _, outcome, *_ = written
    found = read_safetensors(model.weights_path)
    assert found.keys() == outcome.weights.keys()
    for key, value in outcome.weights.items():
        assert np.array_equal(found[key], value.numpy())


def test_the_recipe_reads_back_as_the_same(written):
    model, _, _, told, _ = written
    assert Recipe().replace(read_recipe(model.folder / RECIPE)) == told.recipe


def test_metrics_are_those_of_the_weights_kept(written):
    model, _, outcome, told, returned = written
    metrics = json.loads((model.folder / METRICS).read_text())
    assert metrics == json.loads(json.dumps(returned))
    figures = outcome.quality.to_json(LABELS)
    assert {key: metrics[key] for key in figures} == json.loads(json.dumps(figures))
    assert metrics["training_images"] == 123
    assert (metrics["epochs"], metrics["epoch_kept"]) == (2, 2)
    assert metrics["seconds"] == 6.5
    assert metrics["images_per_s"] == 150.0
    assert metrics["processes"] == 2
    assert metrics["machine"]["cores"] == told.machine.cores


def test_no_file_tells_where_the_training_ran(written):
    model, *_ = written
    for name, data in content(model.folder).items():
        assert b"/home/jo" not in data, name


def test_pictures_are_pictures(written):
    model, *_ = written
    for name in PICTURES:
        start = (model.folder / name).read_bytes()[:200]
        assert (
            start.startswith(b"\x89PNG")
            if name.endswith(".png")
            else b"<svg" in start or (start.startswith(b"<?xml"))
        )


def test_the_manifest_says_where_the_weights_are_from(written):
    model, *_ = written
    record = model.weights_record
    assert record.source == "trained on photos"
    assert len(record.sha256) == 64
    assert model.artifacts == ()


@pytest.fixture
def undrawn(monkeypatch):
    """Spare tests of other things the seconds that pictures take."""
    for drawing in ("draw_history", "draw_confusion"):
        monkeypatch.setattr(finish, drawing, lambda *_: b"drawn")


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_opens_the_folder_and_gives_the_same_logits(toys, timm, tmp_path, undrawn, variant):
    spec, outcome, told = trained(toys, variant)
    write_model(Model(tmp_path / "model"), spec, outcome, told)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert theirs.pretrained_cfg["label_names"] == list(LABELS)
    assert theirs.pretrained_cfg["input_size"] == [3, 64, 64]
    network = create_network(variant, len(LABELS)).eval()
    network.load_state_dict(outcome.weights)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = network(pixels), theirs(pixels)
    assert expected.std() > 0.1  # or the weights would hide a difference
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_our_own_runtime_opens_the_folder_and_gives_the_same_logits(written):
    model, _, outcome, *_ = written
    network = create_network("coat_lite_toy", len(LABELS)).eval()
    network.load_state_dict(outcome.weights)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), eager.load(model.folder, LoadOptions()) as runner:
        found = runner.run(pixels.numpy())["logits"]
        assert np.array_equal(found, network(pixels).numpy())


@pytest.fixture
def old(toys, tmp_path, undrawn):
    """A model that was there before, and what its files hold."""
    model = Model(tmp_path / "model")
    write_model(model, *trained(toys, seed=7))
    (model.folder / "mine.txt").write_text("a note of the user's")
    return Model(model.folder), content(model.folder)


def test_a_new_training_replaces_what_is_a_models_and_leaves_the_rest(toys, old):
    model, before = old
    spec, outcome, told = trained(toys, "coat_toy")
    write_model(model, spec, outcome, told)
    after = content(model.folder)
    assert after.keys() == before.keys()
    assert after["mine.txt"] == before["mine.txt"]
    for name in (CONFIG, WEIGHTS, MANIFEST, CARD):
        assert after[name] != before[name]
    assert Model(model.folder).spec == spec


@pytest.mark.parametrize("fails", ["render_card", "draw_confusion", "draw_history", "measured"])
def test_a_failure_half_way_leaves_the_old_model_untouched(toys, old, monkeypatch, fails):
    model, before = old

    def fail(*_, **__):
        raise RepositoryError("fails on purpose")

    monkeypatch.setattr(finish, fails, fail)
    with pytest.raises(RepositoryError, match="on purpose"):
        write_model(model, *trained(toys, "coat_toy"))
    assert content(model.folder) == before


@pytest.mark.parametrize("at", [1, 2, 5, 9, 10])
def test_a_disk_that_fills_up_leaves_the_old_model_untouched(toys, old, monkeypatch, at):
    """At each of the files, the last one being the manifest."""
    model, before = old
    write_file, written = model_module.write_file, []

    def full(path, data):
        written.append(path)
        if len(written) == at:
            raise RepositoryError(f"{path}: cannot be written (No space left on device).")
        write_file(path, data)

    monkeypatch.setattr(model_module, "write_file", full)
    with pytest.raises(RepositoryError, match="No space left"):
        write_model(model, *trained(toys, "coat_toy"))
    assert len(FILES) == 10
    assert content(model.folder) == before


def test_a_rename_that_fails_half_way_leaves_the_old_model_untouched(toys, old, monkeypatch):
    model, before = old
    replace_file, renamed = os.replace, []

    def fail(source, target):
        renamed.append(target)
        if len(renamed) == 5:
            raise OSError(errno.EIO, "Input/output error")
        replace_file(source, target)

    monkeypatch.setattr(transaction.os, "replace", fail)
    with pytest.raises(RepositoryError, match="Input/output error"):
        write_model(model, *trained(toys, "coat_toy"))
    assert content(model.folder) == before


def test_a_first_model_that_fails_leaves_no_folder(toys, tmp_path, undrawn, monkeypatch):
    def fail(*_):
        raise RepositoryError("fails on purpose")

    monkeypatch.setattr(finish, "render_card", fail)
    with pytest.raises(RepositoryError):
        write_model(Model(tmp_path / "models" / "new"), *trained(toys))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_written(toys, old, value):
    model, before = old
    spec, outcome, told = trained(toys)
    spoiled = {**outcome.weights, "head.bias": torch.tensor([0.0, value, 0.0])}
    with pytest.raises(WeightsError, match="tensor head.bias holds NaN or Inf"):
        write_model(model, spec, replace(outcome, weights=spoiled), told)
    assert content(model.folder) == before
