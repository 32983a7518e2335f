"""Classes by name, and what every split must have."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from coat_deploy.data.classes import Classes, check_to_train, relabel, some
from coat_deploy.errors import UsageError


@dataclasses.dataclass
class Named:
    label_names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (4, 4), (index, 0, 0))


def named(names: str, *labels: int) -> Named:
    return Named(tuple(names.split()), np.array(labels))


def test_classes_are_in_the_order_of_their_values():
    classes = Classes.of({7: "seven", 9: "nine"})
    assert classes.names == ("seven", "nine")
    assert [classes.find(value, "data") for value in (9, 7)] == [1, 0]


def test_classes_of_a_model_are_found_by_name():
    classes = Classes.of({0: "cat", 1: "dog"}, ("dog", "wolf", "cat"))
    assert classes.names == ("dog", "wolf", "cat")
    assert [classes.find(value, "data") for value in (0, 1)] == [2, 0]


def test_unknown_class_is_told_with_the_nearest_label():
    classes = Classes.of({0: "t_shirt"}, ("hat", "t-shirt"))
    with pytest.raises(
        UsageError, match=r"^data: class 't_shirt' is none of the 2 labels .*mean 't-shirt'"
    ):
        classes.find(0, "data")


def test_label_that_stands_for_two_classes_is_refused():
    classes = Classes.of({0: "crane"}, ("crane", "hat", "crane"))
    with pytest.raises(UsageError, match="'crane' is several of the 3 labels"):
        classes.find(0, "data")


def test_relabelled_images_keep_their_pixels_and_names():
    dataset = relabel(named("cat dog", 0, 1, 1, 0), ("dog", "wolf", "cat"), "data")
    assert dataset.label_names == ("dog", "wolf", "cat")
    assert dataset.labels.tolist() == [2, 0, 0, 2]
    assert len(dataset) == 4
    assert dataset.name(3) == "image 3"
    assert dataset.image(3).getpixel((0, 0)) == (3, 0, 0)


def test_nothing_is_relabelled_without_other_names():
    dataset = named("cat dog", 0, 1)
    assert relabel(dataset, (), "data") is dataset
    assert relabel(dataset, ("cat", "dog"), "data") is dataset


def test_class_without_an_image_need_not_be_a_label():
    assert relabel(named("cat dog", 0, 0), ("cow", "cat"), "data").labels.tolist() == [1, 1]


def test_one_class_cannot_be_trained():
    with pytest.raises(UsageError, match=r"^data: only one class, 'cat' \(expected at least 2\)"):
        check_to_train(named("cat", 0, 0), named("cat", 0), "data")


def test_class_that_is_empty_in_both_splits_is_told():
    with pytest.raises(UsageError, match="^data: no image of class 'dog'"):
        check_to_train(named("cat dog cow", 0, 2), named("cat dog cow", 0, 2), "data")


def test_classes_that_are_empty_in_one_split_are_told_with_the_split():
    with pytest.raises(
        UsageError, match=r"\(classes 'cow', 'dog' only in train; class 'cat' only in validation\)"
    ):
        check_to_train(named("cat dog cow", 1, 2), named("cat dog cow", 0), "data")


def test_other_names_in_the_other_split_are_told():
    with pytest.raises(UsageError, match="class 'dog' only in train; class 'dogs' only in val"):
        check_to_train(named("cat dog", 0, 1), named("cat dogs", 0, 1), "data")


def test_splits_of_the_same_classes_pass():
    check_to_train(named("cat dog", 0, 1, 1), named("cat dog", 1, 0), "data")


def test_a_message_names_a_few():
    assert some(list("abcdefg")) == "'a', 'b', 'c', 'd', 'e' and 2 more"
