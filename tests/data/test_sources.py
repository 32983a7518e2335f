"""Sources by what is given to --data."""

import os

import numpy as np
import pytest

from coat_deploy.data import sources
from coat_deploy.data.dataset import Dataset, Stream
from coat_deploy.data.huggingface import Table
from coat_deploy.data.options import DataOptions
from coat_deploy.data.sources import open_split, open_splits
from coat_deploy.errors import UsageError

ANIMALS = tuple(f"{animal}/{i}.png" for animal in ("cat", "dog") for i in range(10))


def names(dataset):
    return {dataset.name(i) for i in range(len(dataset))}


def refused(match, source, options=DataOptions()):  # noqa: B008
    with pytest.raises(UsageError, match=match) as caught:
        open_splits(source, options)
    assert "\n" not in str(caught.value)


def test_folder_is_opened_by_its_path(write):
    splits = open_splits(str(write(*ANIMALS)))
    assert (len(splits.train), len(splits.validation)) == (18, 2)
    assert isinstance(splits.train, Dataset) and not isinstance(splits.train, Stream)


def test_folder_of_the_home_is_opened(write, monkeypatch):
    monkeypatch.setenv("HOME", str(write(*ANIMALS).parent))
    assert len(open_split("~/data")) == 20


def test_digits_are_built_in():
    pytest.importorskip("sklearn")
    splits = open_splits("digits")
    assert splits.train.label_names == tuple("0123456789")
    assert names(open_split("digits")) == names(splits.validation)
    assert names(open_split("digits", "train")) == names(splits.train)


def test_folder_called_digits_has_a_dot_before_it(write, monkeypatch):
    monkeypatch.chdir(write(*(f"digits/{name}" for name in ANIMALS)))
    assert open_split("./digits").label_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("source", "repository", "configuration"),
    [
        ("hub:uoft-cs/cifar10", "uoft-cs/cifar10", None),
        ("hub:a_b/c.d-1:plain_text", "a_b/c.d-1", "plain_text"),
    ],
)
def test_data_set_of_the_hub_has_an_owner_a_name_and_maybe_a_configuration(
    source, repository, configuration, monkeypatch
):
    def opened(table, split, options):
        assert table == Table(source, "hub", repository, configuration)
        assert (split, options.label_column) == ("test", "kind")
        return dataset

    dataset = object()
    monkeypatch.setattr(sources, "open_table_split", opened)
    assert open_split(source, "test", DataOptions(label_column="kind")) is dataset


@pytest.mark.parametrize("name", ["cifar10", "a/b/c", "a/b c", "a/", "a/b:"])
def test_other_names_of_the_hub_are_refused(name):
    refused(r"not a data set's name \(expected hub:OWNER/NAME", f"hub:{name}")


def test_unknown_source_is_told_with_those_known():
    refused(r"^unknown data source 'digitz' \(known: digits, FOLDER, hub:.*mean 'digits'", "digitz")


@pytest.mark.parametrize("source", ["imagenet:x", "parquet:", "hub:", "/gone", ""])
def test_whatever_else_is_given_is_unknown(source):
    refused("^unknown data source", source)


def test_file_is_no_folder(write):
    refused("not a folder", str(write(*ANIMALS) / "cat" / "1.png"))


def test_single_class_is_refused_for_training_but_not_for_measuring(write):
    folder = str(write(*ANIMALS[:10]))
    refused("only one class, 'cat'", folder)
    assert len(open_split(folder)) == 10


def test_classes_of_a_model_are_found_by_name(write):
    options = DataOptions(label_names=("dog", "cow", "cat"))
    folder = str(write(*ANIMALS))
    dataset = open_split(folder, None, options)
    assert dataset.label_names == ("dog", "cow", "cat")
    assert dataset.labels.tolist() == [2] * 10 + [0] * 10
    splits = open_splits(folder, options)
    assert splits.train.label_names == splits.validation.label_names == ("dog", "cow", "cat")


def test_parts_do_not_depend_on_the_order_of_a_models_classes(write):
    folder = str(write(*ANIMALS))
    turned = open_splits(folder, DataOptions(label_names=("dog", "cat")))
    assert names(turned.validation) == names(open_splits(folder).validation)


def test_folder_that_is_no_label_is_told_with_the_nearest(write):
    options = DataOptions(label_names=("cats", "dog"))
    with pytest.raises(UsageError, match="class 'cat' is none of the 2 labels .*mean 'cats'"):
        open_split(str(write(*ANIMALS)), None, options)


@pytest.mark.parametrize("source", ["digits", "."])
def test_only_tables_have_columns_and_are_streamed(source):
    refused("cannot be streamed", source, DataOptions(streaming=True))
    refused("has no columns, so no 'img'", source, DataOptions(image_column="img"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"validation_share": 0.0}, r"validation share 0: .*more than 0 and less than 1"),
        ({"validation_share": 1.0}, "validation share 1: "),
        ({"validation_share": float("nan")}, "validation share nan: "),
        ({"seed": -1}, "seed -1: "),
        ({"seed": 1 << 32}, "seed 4294967296: .*0 to 4294967295"),
        ({"shuffle_buffer": 0}, "shuffle buffer 0: "),
        ({"stream_length": 0}, "stream length 0: "),
        ({"train_split": "a", "validation_split": "a"}, "split 'a': "),
    ],
)
def test_options_that_cannot_be_are_refused(options, match):
    with pytest.raises(UsageError, match=match):
        DataOptions(**options)


def test_split_that_is_trained_on_is_not_measured_with():
    options = DataOptions(train_split="validation")
    assert options.measured(["validation", "val", "test"]) == "val"
    assert options.measured(["validation"]) is None


def test_clothing_with_splits(shared_data):
    splits = open_splits(str(shared_data / "clothing-96"))
    assert (len(splits.train), len(splits.validation)) == (3068, 341)
    assert len(splits.train.label_names) == 10
    folder = shared_data / "clothing-96" / "train"
    assert splits.train.label_names == tuple(sorted(os.listdir(folder)))
    counts = [len(os.listdir(folder / name)) for name in splits.train.label_names]
    assert np.bincount(splits.train.labels).tolist() == counts
    assert splits.validation.image(340).mode == "RGB"


def test_clothing_without_splits(shared_data, tmp_path):
    source = shared_data / "clothing-256-calibration"
    splits = open_splits(str(source))
    assert len(splits.train) + len(splits.validation) == sum(1 for _ in source.rglob("*.jpg"))
    assert set(splits.validation.labels.tolist()) == set(range(10))
    assert not names(splits.train) & names(splits.validation)
