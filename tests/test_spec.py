import copy
import dataclasses
import json
import math

import pytest

from coat_deploy.errors import SpecError, UsageError
from coat_deploy.spec import (
    MAX_SIDE,
    MODEL_ARGS,
    ModelSpec,
    Preprocess,
    TimmForm,
    WeightsRecord,
    format_size,
    parse_size,
)

FULL = ModelSpec(
    "coat_lite_toy",
    3,
    40,
    Preprocess((64, 96), (0.5, 0.4, 0.3), (0.2, 0.3, 1.0), "bilinear", 1.0, "squash"),
    label_names=("cat", "dog", "Käse [1, 2]"),
    weights=WeightsRecord("timm", "file:///weights", "ab" * 32),
    model_args={"crpe": False, "co_scale": "none"},
)

# As timm writes config.json for the Hub, with keys that we have no use for.
TIMMS = {
    "architecture": "coat_lite_tiny",
    "num_classes": 1000,
    "num_features": 320,
    "global_pool": "token",
    "pretrained_cfg": {
        "tag": "in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 1000,
        "pool_size": None,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
    },
}


def changed(**changes):
    """Return a good document with fields set, "pretrained_cfg.x" inside; `...` removes one."""
    document = copy.deepcopy(FULL.to_json())
    for path, value in changes.items():
        *inner, key = path.split("__")
        place = document["pretrained_cfg"] if inner else document
        if value is ...:
            del place[key]
        else:
            place[key] = value
    return document


def test_a_spec_survives_its_document():
    assert ModelSpec.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL


def test_a_document_survives_its_spec():
    document = FULL.to_json()
    assert ModelSpec.from_json(document).to_json() == document


def test_what_is_unset_is_left_out_of_the_document():
    document = ModelSpec("coat_tiny", 10, 152, Preprocess((224, 224))).to_json()
    assert set(document) == {"architecture", "num_classes", "num_features", "pretrained_cfg"}


def test_timms_own_document_is_read():
    spec = ModelSpec.from_json(TIMMS)
    assert spec == ModelSpec("coat_lite_tiny", 1000, 320, Preprocess((224, 224)))


def test_classes_are_taken_from_the_pretrained_cfg_when_they_stand_there_only():
    document = {key: value for key, value in TIMMS.items() if key != "num_classes"}
    assert ModelSpec.from_json(document).num_classes == 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", ...),
        ("architecture", 3),
        ("architecture", ""),
        ("num_classes", -1),
        ("num_classes", True),
        ("num_classes", "10"),
        ("num_classes", 10**400),
        ("num_features", -1),
        ("num_features", 1.5),
        ("pretrained_cfg", ...),
        ("pretrained_cfg", []),
        ("label_names", "cat"),
        ("label_names", {"0": "cat"}),
        ("label_names", ["cat", 2, "dog"]),
        ("label_names", ["cat", "dog"]),
        ("label_set", 5),
        ("label_set", ["imagenet-1k"]),
        ("weights", "timm"),
        ("weights", {"url": "file:///weights"}),
        ("weights", {"source": None}),
        ("model_args", ["cpe"]),
        ("pretrained_cfg__input_size", [3, 224]),
        ("pretrained_cfg__input_size", [1, 224, 224]),
        ("pretrained_cfg__input_size", [3, 0, 224]),
        ("pretrained_cfg__input_size", [3, 224, MAX_SIDE + 1]),
        ("pretrained_cfg__input_size", [3, 224.0, 224]),
        ("pretrained_cfg__input_size", 224),
        ("pretrained_cfg__mean", [0.5, 0.5]),
        ("pretrained_cfg__mean", 0.5),
        ("pretrained_cfg__mean", [0.5, 0.5, math.nan]),
        ("pretrained_cfg__mean", [0.5, 0.5, 10**400]),
        ("pretrained_cfg__mean", [0.5, 0.5, "0.5"]),
        ("pretrained_cfg__std", [0.5, 0.5, 0]),
        ("pretrained_cfg__std", [0.5, 0.5, -1]),
        ("pretrained_cfg__std", [0.5, 0.5, math.inf]),
        ("pretrained_cfg__crop_pct", 0),
        ("pretrained_cfg__crop_pct", 1.5),
        ("pretrained_cfg__crop_pct", math.nan),
        ("pretrained_cfg__crop_pct", "0.9"),
        ("pretrained_cfg__crop_mode", "centre"),
        ("pretrained_cfg__interpolation", "cubic"),
        ("pretrained_cfg__interpolation", 3),
    ],
)
def test_a_bad_field_is_named_with_its_file(field, value):
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_json(changed(**{field: value}), "models/mine/config.json")
    assert str(caught.value).startswith("models/mine/config.json: ")
    assert f"'{field.split('__')[-1]}'" in str(caught.value)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"cpee": True}, "Did you mean 'cpe'?"),
        ({"cpe": "yes"}, "'model_args.cpe'"),
        ({"crpe": 1}, "'model_args.crpe'"),
        ({"co_scale": "both"}, '"interpolation" or "direct" or "none"'),
        ({"co_scale": ["direct"]}, "'model_args.co_scale'"),
        ({"in_chans": 1}, "'model_args.in_chans' must be 3"),
        ({"global_pool": "avg"}, "'model_args.global_pool' must be \"token\""),
        ({"num_classes": 5}, "'model_args.num_classes' must be 3"),
    ],
)
def test_a_bad_network_switch_is_named(args, named):
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_json(changed(model_args=args))
    assert named in str(caught.value)


def test_timms_own_arguments_say_what_a_coat_is_anyway():
    timms = {"in_chans": 3, "num_classes": 1000, "global_pool": "token", "img_size": [224, 224]}
    assert ModelSpec.from_json(TIMMS | {"model_args": timms}) == ModelSpec.from_json(TIMMS)


def test_network_switches_are_those_of_the_network():
    blocks = pytest.importorskip("coat_deploy.network.blocks")
    assert MODEL_ARGS["co_scale"] == blocks.CoScale.__args__


@pytest.mark.parametrize("document", [None, [], "coat", 3, True])
def test_a_document_that_is_no_object_is_refused(document):
    with pytest.raises(SpecError, match="mine: not a JSON object"):
        ModelSpec.from_json(document, "mine")


def test_an_error_quotes_no_more_than_a_line_of_what_it_got():
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_json(changed(model_args=["x" * 10_000]))
    assert len(str(caught.value)) < 200


def test_the_digest_ignores_where_weights_came_from():
    assert dataclasses.replace(FULL, weights=None).digest() == FULL.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "coat_toy"},
        {"num_classes": 4, "label_names": ()},
        {"label_names": ("dog", "cat", "cheese")},
        {"label_set": "imagenet-1k"},
        {"model_args": {}},
        {"preprocess": FULL.preprocess.at((64, 64))},
        {"preprocess": dataclasses.replace(FULL.preprocess, mean=(0.5, 0.4, 0.31))},
        {"preprocess": dataclasses.replace(FULL.preprocess, std=(0.2, 0.3, 0.9))},
        {"preprocess": dataclasses.replace(FULL.preprocess, crop_pct=0.9)},
        {"preprocess": dataclasses.replace(FULL.preprocess, crop_mode="center")},
        {"preprocess": dataclasses.replace(FULL.preprocess, interpolation="bicubic")},
    ],
)
def test_the_digest_changes_with_everything_else(change):
    assert dataclasses.replace(FULL, **change).digest() != FULL.digest()


def test_the_digest_is_the_same_after_reading_the_document_back():
    assert ModelSpec.from_json(json.loads(json.dumps(FULL.to_json()))).digest() == FULL.digest()


def test_other_labels_of_as_many_classes_keep_where_weights_are():
    spec = FULL.with_classes(3, ("a", "b", "c"))
    assert (spec.label_names, spec.weights) == (("a", "b", "c"), FULL.weights)


def test_names_given_take_the_place_of_a_label_set():
    spec = dataclasses.replace(FULL, label_names=(), label_set="imagenet-1k")
    assert spec.with_classes(3, ("a", "b", "c")).label_set is None


def test_another_number_of_classes_drops_labels_and_weights():
    spec = dataclasses.replace(FULL, label_set="imagenet-1k").with_classes(7)
    assert (spec.num_classes, spec.label_names, spec.label_set, spec.weights) == (7, (), None, None)


def test_as_many_classes_and_no_names_change_nothing():
    assert FULL.with_classes(3) == FULL


@pytest.mark.parametrize(
    ("text", "size"),
    [("224", (224, 224)), ("224x320", (224, 320)), ("224X320", (224, 320)), ("1", (1, 1))],
)
def test_a_size_is_height_by_width(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "x", "224x", "x224", "0", "224x0", "-224", "224x224x3", "2.5", "big", f"{MAX_SIDE + 1}"],
)
def test_what_is_no_size_is_quoted(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert f"size '{text}'" in str(caught.value)


def test_a_formatted_size_is_read_back():
    assert parse_size(format_size((250, 190))) == (250, 190)


NANO = ModelSpec(
    architecture="coat_lite_nano",
    num_classes=3,
    num_features=160,
    preprocess=Preprocess((64, 64)),
    label_names=("a", "b", "c"),
    timm=TimmForm("coat_lite_tiny", {"embed_dims": [32, 64, 128, 160], "parallel_depth": 0}),
)


def test_variant_of_ours_is_written_as_one_that_timm_knows_and_reads_back():
    document = NANO.to_json()
    assert document["architecture"] == "coat_lite_tiny"
    assert document["variant"] == "coat_lite_nano"
    assert document["model_args"] == {"embed_dims": [32, 64, 128, 160], "parallel_depth": 0}
    assert ModelSpec.from_json(document) == NANO


def test_variant_of_ours_keeps_its_switches_beside_the_sizes():
    spec = dataclasses.replace(NANO, model_args={"crpe": False})
    assert spec.to_json()["model_args"]["crpe"] is False
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("sizes", ["wide", [32, 64], [32, 64, 128, -1], [1.5] * 4, [True] * 4])
def test_sizes_of_a_variant_that_are_none_are_refused(sizes):
    document = NANO.to_json()
    document["model_args"]["embed_dims"] = sizes
    with pytest.raises(SpecError, match=r"model_args\.embed_dims"):
        ModelSpec.from_json(document, "x/config.json")


def test_sizes_without_a_variant_are_refused():
    document = NANO.to_json()
    del document["variant"]
    with pytest.raises(SpecError, match="embed_dims"):
        ModelSpec.from_json(document)
