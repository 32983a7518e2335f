import json
import logging
from dataclasses import replace

import pytest
import torch

from coat_deploy.errors import UsageError, WeightsError
from coat_deploy.model import CONFIG, WEIGHTS, Model
from coat_deploy.network import weights
from coat_deploy.network.coat import create_network
from coat_deploy.network.download import Download
from coat_deploy.network.keys import is_head
from coat_deploy.network.weights import Checkpoint, to_safetensors
from coat_deploy.repository import Repository
from coat_deploy.spec import Preprocess, WeightsRecord
from coat_deploy.train.recipe import Recipe
from coat_deploy.train.start import begin, find_base, plan_spec

LABELS = ("class 0", "class 1", "class 2")


def file_of(network, path):
    tensors = {key: value.numpy() for key, value in network.state_dict().items()}
    path.write_bytes(to_safetensors(Checkpoint(tensors, WeightsRecord("test"))))
    return path


@pytest.fixture
def base(toys, tmp_path):
    """Return a function that makes a model of the user's, and the network in it."""

    def made(variant="coat_lite_toy", classes=3, **changes):
        spec = replace(toys.spec(variant, classes), **changes)
        folder = tmp_path / "models" / "mine"
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(json.dumps(spec.to_json()))
        network = toys.network(variant, classes, seed=5, **spec.model_args)
        file_of(network, folder / WEIGHTS)
        return Model(folder), network

    return made


def assert_same(found, expected, only=lambda key: True):
    keys = [key for key in expected if only(key)]
    assert keys
    for key in keys:
        assert torch.equal(found[key], expected[key]), key


def is_trunk(key):
    return not is_head(key)


def test_from_scratch_is_a_function_of_the_seed_alone(toys):
    spec = toys.spec()
    first = begin(spec, toys.recipe(seed=1), None).state_dict()
    torch.randn(17)  # whatever was drawn before
    again = begin(spec, toys.recipe(seed=1, drop_path=0.3, epochs=7), None).state_dict()
    other = begin(spec, toys.recipe(seed=2), None).state_dict()
    assert_same(again, first)
    assert not torch.equal(other["head.weight"], first["head.weight"])


def test_scratch_is_pytorchs_own_initialisation_of_the_network(toys):
    torch.manual_seed(4)
    expected = create_network("coat_toy", 3).state_dict()
    assert_same(begin(toys.spec("coat_toy"), toys.recipe(seed=4), None).state_dict(), expected)


def test_the_network_is_told_of_drop_path_and_gradient_checkpointing(toys):
    network = begin(toys.spec(), toys.recipe(drop_path=0.25, gradient_checkpointing=True), None)
    assert network.serial_blocks1[0].drop_path.probability == 0.25
    assert network.gradient_checkpointing
    assert network.training


def test_fine_tuning_keeps_the_bits_of_all_but_the_head(toys, base, caplog):
    model, trained = base(classes=5)
    with caplog.at_level(logging.WARNING):
        network = begin(toys.spec(), toys.recipe(init="mine", seed=3), model).state_dict()
    assert_same(network, trained.state_dict(), is_trunk)
    torch.manual_seed(3)
    assert_same(network, create_network("coat_lite_toy", 3).state_dict(), is_head)
    assert "head drawn at random for 3 classes" in caplog.text


def test_of_the_same_classes_in_the_same_order_the_head_stays(toys, base):
    model, trained = base()
    network = begin(toys.spec(), toys.recipe(init="mine"), model).state_dict()
    assert_same(network, trained.state_dict())


@pytest.mark.parametrize(
    "labels", [("class 1", "class 0", "class 2"), ("a", "b", "c")], ids=["other order", "others"]
)
def test_of_as_many_but_other_classes_the_head_is_new(toys, base, labels):
    model, trained = base(label_names=labels)
    network = begin(toys.spec(), toys.recipe(init="mine"), model).state_dict()
    assert_same(network, trained.state_dict(), is_trunk)
    assert not torch.equal(network["head.weight"], trained.state_dict()["head.weight"])


def test_a_bare_file_gives_all_but_the_head(toys, tmp_path):
    trained = toys.network(seed=5)
    path = file_of(trained, tmp_path / "any.safetensors")
    network = begin(toys.spec(), toys.recipe(init=str(path)), None).state_dict()
    assert_same(network, trained.state_dict(), is_trunk)
    assert not torch.equal(network["head.weight"], trained.state_dict()["head.weight"])


def test_parameters_that_blocks_share_are_still_shared(toys, base):
    model, _ = base("coat_toy", classes=4)
    network = begin(toys.spec("coat_toy"), toys.recipe(init="mine"), model)
    assert len(list(network.parameters())) == len(list(toys.network("coat_toy").parameters()))


def test_a_model_of_another_variant_is_one_clear_line(toys, base):
    model, _ = base("coat_toy")
    with pytest.raises(WeightsError, match="got coat_toy, expected coat_lite_toy") as caught:
        begin(toys.spec(), toys.recipe(init="mine"), model)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_variant_is_one_clear_line_that_names_it(toys, tmp_path):
    path = file_of(toys.network("coat_toy"), tmp_path / "any.safetensors")
    with pytest.raises(
        WeightsError, match="does not fit coat_lite_toy.*It fits coat_toy"
    ) as caught:
        begin(toys.spec(), toys.recipe(init=str(path)), None)
    assert "\n" not in str(caught.value)


def test_a_model_with_other_switches_is_refused_though_its_shapes_fit(toys, base):
    """The strategy "none" has the parameters of "interpolation", and computes otherwise."""
    model, _ = base("coat_toy", model_args={"co_scale": "none"})
    with pytest.raises(WeightsError, match="model_args: got {'co_scale': 'none'}, expected {}"):
        begin(toys.spec("coat_toy"), toys.recipe(init="mine"), model)
    same = replace(toys.spec("coat_toy"), model_args={"co_scale": "none"})
    assert begin(same, toys.recipe(init="mine"), model).num_classes == 3


def test_a_model_without_weights_is_one_clear_line(toys, base):
    model, _ = base()
    model.weights_path.unlink()
    with pytest.raises(WeightsError, match="mine: holds no weights. Begin with timm or official"):
        begin(toys.spec(), toys.recipe(init="mine"), model)


def repository(tmp_path):
    return Repository.open(tmp_path / "models")


def test_a_base_is_found_by_name_by_folder_or_is_none(base, tmp_path):
    model, _ = base()
    place = repository(tmp_path)
    assert find_base("scratch", "coat_lite_toy", place) is None
    assert find_base(str(model.weights_path), "coat_lite_toy", place) is None
    assert find_base("mine", "coat_lite_toy", place).folder == model.folder
    assert find_base(str(model.folder), "coat_lite_toy", place).folder == model.folder
    with pytest.raises(UsageError, match="unknown model 'mone'.*'mine'"):
        find_base("mone", "coat_lite_toy", place)


@pytest.mark.parametrize("init", ["timm", "official"])
def test_of_a_variant_without_published_weights_none_are_sought(init, tmp_path):
    with pytest.raises(UsageError, match="nobody published weights of coat_lite_toy"):
        find_base(init, "coat_lite_toy", repository(tmp_path))


def test_published_weights_come_with_published_labels_whatever_the_user_called_a_model(
    base, toys, tmp_path, monkeypatch
):
    """A model of the user's by the variant's name has other classes than the published file."""
    _, _ = base()
    (tmp_path / "models" / "mine").rename(tmp_path / "models" / "coat_lite_tiny")
    model = find_base("timm", "coat_lite_tiny", repository(tmp_path))
    assert model.spec.num_classes == 1000
    torch.manual_seed(0)
    published = create_network("coat_lite_tiny", 1000)
    path = file_of(published, tmp_path / "published.safetensors")
    monkeypatch.setattr(
        weights, "fetch_hub", lambda name, options: Download(path, "https://x", "0" * 64)
    )
    spec = plan_spec("coat_lite_tiny", LABELS, Recipe(size=64), model.spec.preprocess)
    network = begin(spec, toys.recipe(init="timm"), model).state_dict()
    assert_same(network, published.state_dict(), is_trunk)
    assert network["head.weight"].shape == (3, 320)


def test_a_spec_has_the_variants_own_size_unless_the_recipe_says_another():
    plain = plan_spec("coat_lite_toy", LABELS, Recipe())
    assert plain.preprocess == Preprocess((64, 64), crop_pct=0.9)
    assert (plain.num_classes, plain.num_features, plain.label_names) == (3, 40, LABELS)
    larger = plan_spec("coat_lite_toy", LABELS, Recipe(size=96, crop_pct=1.0))
    assert larger.preprocess == Preprocess((96, 96), crop_pct=1.0)


def test_a_spec_takes_colours_and_interpolation_over_from_its_base():
    inherited = Preprocess((224, 224), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 0.8, "squash")
    found = plan_spec("coat_lite_toy", LABELS, Recipe(size=96), inherited).preprocess
    assert found == replace(inherited, input_size=(96, 96), crop_pct=0.9)


@pytest.mark.parametrize(
    ("fields", "subject"), [({"size": 31}, "size"), ({"train_size": 16}, "train_size")]
)
def test_sizes_too_small_for_the_variant_are_one_clear_line(fields, subject):
    with pytest.raises(UsageError, match=f"^{subject}: too small for coat_lite_toy .*least 32"):
        plan_spec("coat_lite_toy", LABELS, Recipe(**fields))


def test_the_least_size_can_be_trained(toys):
    spec = plan_spec("coat_toy", LABELS, Recipe(size=32, train_size=32))
    network = begin(spec, toys.recipe(), None)
    network(torch.zeros(1, 3, *spec.preprocess.input_size)).sum().backward()


def test_an_unknown_variant_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="unknown architecture 'coat_lite_toi'"):
        plan_spec("coat_lite_toi", LABELS, Recipe())
