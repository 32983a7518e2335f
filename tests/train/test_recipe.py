import dataclasses
import math
import subprocess
import sys
import tomllib

import pytest

from coat_deploy.errors import UsageError
from coat_deploy.train.recipe import (
    KNOBS,
    MAX_RECIPE_BYTES,
    PRESETS,
    SOURCE_FIELDS,
    Recipe,
    get_preset,
    read_recipe,
    resolve_recipe,
)

FRACTIONS = [field.name for field in dataclasses.fields(Recipe) if isinstance(field.default, float)]
NUMBERS = [*FRACTIONS, "epochs", "batch_size", "seed"]


def written(tmp_path, text):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return file


def peak_rate(recipe, processes):
    return recipe.learning_rate * recipe.batch_size * processes / 512


@pytest.mark.parametrize("source", ["", *SOURCE_FIELDS])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_same_after_a_round_trip_through_its_file(preset, source, tmp_path):
    recipe = get_preset(preset, source)
    fields = read_recipe(written(tmp_path, recipe.to_toml()))
    assert fields == dataclasses.asdict(recipe)
    assert Recipe().replace(fields) == recipe


def test_a_file_names_every_field_with_what_it_is_for():
    text = Recipe().to_toml()
    assert set(tomllib.loads(text)) == set(KNOBS)
    assert all(f"# {knob.help}" in text for knob in KNOBS.values())


def test_texts_survive_a_file_whatever_they_hold(tmp_path):
    recipe = Recipe().replace({"init": 'C:\\models\\"mine" # not a comment'})
    assert read_recipe(written(tmp_path, recipe.to_toml()))["init"] == recipe.init


def test_the_defaults_are_the_authors_at_eight_processes_of_256_images():
    recipe = get_preset("imagenet")
    assert recipe == Recipe()
    peak = peak_rate(recipe, processes=8)
    assert peak == pytest.approx(2e-3)
    assert peak * recipe.warmup_factor == pytest.approx(1e-6)
    assert peak * recipe.final_factor == pytest.approx(1e-5)
    published = {
        "epochs": 300, "batch_size": 256, "warmup_epochs": 5.0, "weight_decay": 0.05,
        "label_smoothing": 0.1, "rand_augment": 2, "rand_augment_magnitude": 9.0, "erase": 0.25,
        "mixup": 0.8, "cutmix": 1.0, "mix_share": 1.0, "repeats": 3, "ema_decay": 0.99996,
        "drop_path": 0.0, "clip_norm": 0.0, "layer_decay": 1.0, "jitter": 0.0, "flip": 0.5,
        "crop_min": 0.08, "crop_aspect": 4 / 3, "rotate": 0.0, "shift": 0.0,
    }  # fmt: skip
    assert {name: getattr(recipe, name) for name in published} == published


def test_the_second_stage_is_the_authors_at_eight_processes_of_32_images():
    recipe = get_preset("finetune-384")
    assert peak_rate(recipe, processes=8) == pytest.approx(5e-6)
    assert recipe.final_factor == 1 and recipe.warmup_epochs == 0
    published = {
        "epochs": 6, "batch_size": 32, "size": 384, "weight_decay": 1e-8, "drop_path": 0.2,
        "clip_norm": 5.0,
    }  # fmt: skip
    assert {name: getattr(recipe, name) for name in published} == published


@pytest.mark.parametrize("preset", PRESETS)
def test_digits_are_never_mirrored(preset):
    assert get_preset(preset, "digits").flip == 0


def test_an_unknown_source_changes_nothing():
    assert get_preset("small", "photos/train") == get_preset("small")


@pytest.mark.parametrize("name", NUMBERS)
def test_not_a_number_is_in_no_range(name):
    with pytest.raises(UsageError, match=f"^{name}: "):
        Recipe().replace({name: math.nan})


@pytest.mark.parametrize("name", KNOBS)
def test_the_limits_of_a_range_are_in_it_and_nothing_beyond(name):
    knob, kind = KNOBS[name], type(getattr(Recipe(), name))
    if kind not in (int, float):
        return
    # A warm-up must not be longer than the training, which is another rule.
    calm = Recipe().replace({"epochs": 100_000, "warmup_epochs": 0.0})
    for end in {knob.least, knob.most} - {math.inf}:
        assert getattr(calm.replace({name: kind(end)}), name) == end
        outside = end - 1 if end == knob.least else end + 1
        with pytest.raises(UsageError, match=f"^{name}: out of range .*{knob.least:g} to"):
            calm.replace({name: kind(outside)})


@pytest.mark.parametrize("name", FRACTIONS)
def test_a_whole_number_stands_for_a_fraction(name):
    knob = KNOBS[name]
    whole = math.ceil(knob.least)
    if whole <= knob.most:
        value = getattr(Recipe().replace({name: whole}), name)
        assert value == whole and type(value) is float


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("epochs", 3.0, "a whole number"),
        ("epochs", True, "a whole number"),
        ("flip", True, "a number"),
        ("flip", "0.5", "a number"),
        ("channels_last", 1, "true or false"),
        ("init", 3, "a text"),
        ("precision", None, "a text"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, wanted):
    with pytest.raises(UsageError, match=f"^{name}: must be {wanted}"):
        Recipe().replace({name: value})


def test_the_constructor_checks_as_well():
    with pytest.raises(UsageError, match="^flip: out of range"):
        Recipe(flip=1.5)


def test_an_unknown_choice_gets_the_nearest():
    with pytest.raises(UsageError, match=r"unknown precision 'bf61'.*Did you mean 'bf16'\?"):
        Recipe().replace({"precision": "bf61"})


def test_an_unknown_field_gets_the_nearest():
    with pytest.raises(UsageError, match=r"'learn_rate'.*Did you mean 'learning_rate'\?"):
        Recipe().replace({"learn_rate": 1e-3})


def test_an_unknown_preset_gets_the_nearest():
    with pytest.raises(UsageError, match=r"unknown preset 'smal'.*Did you mean 'small'\?"):
        get_preset("smal")


def test_a_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(UsageError, match=r"^warmup_epochs: longer.*got 5, expected at most 3"):
        Recipe().replace({"epochs": 3})


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().epochs = 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("epochs = ", "not a recipe file"),
        ("epochs = 1\nepochs = 2", "not a recipe file"),
        ("flip = nan", "flip: out of range"),
        ("flip = 2", "flip: out of range"),
        ("flip = 'often'", "flip: must be a number"),
        ("[flip]\nshare = 1", "flip: must be a number"),
        ("fliq = 0.5", "unknown field of a recipe 'fliq'.*Did you mean 'flip'"),
        ("init = 'x'\n" + "#" * MAX_RECIPE_BYTES, "larger than"),
    ],
    ids=lambda text: text[:20],
)
def test_a_bad_recipe_file_is_named(text, reason, tmp_path):
    with pytest.raises(UsageError, match=rf"mine\.toml: .*{reason}"):
        read_recipe(written(tmp_path, text))


def test_a_file_of_other_bytes_is_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"mine\.toml: not a recipe file"):
        read_recipe(file)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / name)


def test_a_file_may_set_a_few_fields_with_whole_numbers_for_fractions(tmp_path):
    fields = read_recipe(written(tmp_path, "flip = 0\nepochs = 12\n"))
    recipe = get_preset("small").replace(fields)
    assert (recipe.flip, recipe.epochs, recipe.mixup) == (0.0, 12, get_preset("small").mixup)


def test_importing_the_recipe_imports_no_pytorch():
    code = "import sys, coat_deploy.train.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_short_training_shortens_the_presets_warm_up():
    assert resolve_recipe("small", "", {"epochs": 10}).warmup_epochs == 1
    assert resolve_recipe("small", "", {"epochs": 500}).warmup_epochs == 5
    assert resolve_recipe("small", "", {"epochs": 10, "warmup_epochs": 3}).warmup_epochs == 3
    assert resolve_recipe("small", "", {}) == get_preset("small")
