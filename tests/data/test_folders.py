"""Class folders, with and without splits."""

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from coat_deploy.data.folders import open_folder, open_folder_split
from coat_deploy.data.options import DataOptions
from coat_deploy.errors import ImageError, UsageError

ANIMALS = tuple(f"{animal}/{i}.png" for animal in ("cat", "dog") for i in range(10))
SPLIT = (
    "train/cat/1.png",
    "train/dog/2.png",
    "train/dog/old/3.png",
    "val/cat/4.png",
    "val/dog/5.png",
)


def places(dataset, folder):
    return [os.path.relpath(dataset.name(i), folder) for i in range(len(dataset))]


def test_classes_are_the_sorted_names_of_the_folders(write):
    folder = write("dog/1.png", "Ant/2.jpg", "cat/3.webp", "cat/old/4.png", "notes.txt")
    dataset = open_folder_split(folder, None, DataOptions())
    assert dataset.label_names == ("Ant", "cat", "dog")
    assert places(dataset, folder) == ["Ant/2.jpg", "cat/3.webp", "cat/old/4.png", "dog/1.png"]
    assert dataset.labels.tolist() == [0, 1, 1, 2]
    assert dataset.labels.dtype == np.int64


def test_split_folders_are_what_is_trained_on_and_measured_with(write):
    folder = write(*SPLIT)
    splits = open_folder(folder, DataOptions())
    assert places(splits.train, folder) == [
        "train/cat/1.png",
        "train/dog/2.png",
        "train/dog/old/3.png",
    ]
    assert places(splits.validation, folder) == ["val/cat/4.png", "val/dog/5.png"]
    assert splits.train.label_names == splits.validation.label_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (("test", "val", "valid", "validation"), "validation"),
        (("test", "val", "valid"), "val"),
        (("test", "valid"), "valid"),
        (("test",), "test"),
    ],
)
def test_first_usual_name_is_measured_with(write, there, taken):
    folder = write(*(f"{split}/{animal}/1.png" for split in ("train", *there) for animal in "ab"))
    splits = open_folder(folder, DataOptions())
    assert places(splits.validation, folder) == [f"{taken}/a/1.png", f"{taken}/b/1.png"]
    assert places(open_folder_split(folder, None, DataOptions()), folder)[0] == f"{taken}/a/1.png"


def test_splits_of_other_names_can_be_named(write):
    folder = write(*(f"{split}/{animal}/1.png" for split in ("mine", "yours") for animal in "ab"))
    splits = open_folder(folder, DataOptions(train_split="mine", validation_split="yours"))
    assert places(splits.train, folder) == ["mine/a/1.png", "mine/b/1.png"]
    assert places(splits.validation, folder) == ["yours/a/1.png", "yours/b/1.png"]


def test_share_of_each_class_is_held_back_where_no_split_is(write):
    folder = write(*ANIMALS)
    splits = open_folder(folder, DataOptions(validation_share=0.2))
    assert np.bincount(splits.validation.labels).tolist() == [2, 2]
    both = places(splits.train, folder) + places(splits.validation, folder)
    assert sorted(both) == sorted(ANIMALS)


def test_share_is_held_back_of_a_lone_training_split(write):
    folder = write(*(f"train/{name}" for name in ANIMALS))
    splits = open_folder(folder, DataOptions(validation_share=0.3))
    assert (len(splits.train), len(splits.validation)) == (14, 6)
    held = open_folder_split(folder, "validation", DataOptions(validation_share=0.3))
    assert places(held, folder) == places(splits.validation, folder)
    assert len(open_folder_split(folder, None, DataOptions())) == 20


def test_parts_of_a_training_can_be_measured_by_name(write):
    folder = write(*ANIMALS)
    splits = open_folder(folder, DataOptions(seed=5))
    for name, part in (("train", splits.train), ("validation", splits.validation)):
        assert places(open_folder_split(folder, name, DataOptions(seed=5)), folder) == places(
            part, folder
        )
    assert len(open_folder_split(folder, None, DataOptions())) == 20


def test_any_folder_of_splits_can_be_measured_by_name(write):
    folder = write(*SPLIT, "holiday/cat/9.png")
    assert places(open_folder_split(folder, "holiday", DataOptions()), folder) == [
        "holiday/cat/9.png"
    ]


def test_class_may_be_called_train(write):
    folder = write("train/1.png", "train/2.png", "plane/1.png", "plane/2.png")
    assert open_folder(folder, DataOptions()).train.label_names == ("plane", "train")


def test_orientation_of_the_camera_is_applied(write, encode):
    folder = write("cat/1.png", "dog/2.png")
    data = encode(size=(8, 6), form="TIFF", orientation=6)
    (folder / "cat" / "1.png").write_bytes(data)
    image = open_folder_split(folder, None, DataOptions()).image(0)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (image.mode, image.size) == ("RGB", (6, 8))
    assert (np.asarray(image) == np.asarray(expected)).all()


def test_corrupt_image_is_found_when_it_is_asked_for(write):
    folder = write("cat/1.png", "dog/2.png")
    (folder / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    dataset = open_folder_split(folder, None, DataOptions())
    with pytest.raises(ImageError, match=r"cat/1\.png: "):
        dataset.image(0)
    assert dataset.image(1).size == (8, 6)


def refused(folder, match, options=DataOptions()):  # noqa: B008
    with pytest.raises(UsageError, match=match) as caught:
        open_folder(folder, options)
    assert "\n" not in str(caught.value)


def test_empty_folder_is_refused(tmp_path):
    refused(tmp_path, "no image in this folder")


def test_empty_class_folder_is_named(write):
    folder = write(*ANIMALS)
    (folder / "cow").mkdir()
    refused(folder, r"data/cow: no image in this class folder \(empty: 'cow'\)")


def test_class_folder_that_is_empty_in_one_split_only_is_named(write):
    folder = write(*SPLIT, "train/cow/7.png")
    (folder / "val" / "cow").mkdir()
    refused(folder, r"data/val/cow: no image in this class folder")


def test_class_folders_that_differ_between_splits_are_named(write):
    folder = write(*SPLIT, "train/cow/1.png", "val/hen/1.png")
    refused(folder, r"\(class 'cow' only in train; class 'hen' only in validation\)")


def test_images_outside_class_folders_are_counted(write):
    folder = write(*ANIMALS, "a.png", "b.png")
    refused(folder, r"data/a\.png: lies in no class folder of .*data \(so do 2 of 22 images\)")


def test_splits_without_class_folders_are_not_taken_for_classes(write):
    folder = write("train/1.png", "validation/2.png")
    refused(folder, r"train/1\.png: lies in no class folder")


def test_class_with_one_image_cannot_be_split(write):
    refused(write(*ANIMALS, "cow/1.png"), "class 'cow' has one image")


def test_missing_training_split_is_told_with_those_there(write):
    folder = write("validation/cat/1.png", "validation/dog/1.png")
    refused(folder, r"unknown split 'train' \(known: validation\)")


def test_unknown_split_is_told_with_the_nearest(write):
    folder = write(*SPLIT)
    refused(folder, "unknown split 'vla'.*Did you mean 'val'", DataOptions(validation_split="vla"))
    with pytest.raises(UsageError, match="unknown split 'cat'"):
        open_folder_split(folder, "cat", DataOptions())


def test_unknown_split_of_class_folders_is_told(write):
    with pytest.raises(UsageError, match=r"unknown split 'test' \(known: train, validation\)"):
        open_folder_split(write(*ANIMALS), "test", DataOptions())


def test_folder_that_cannot_be_listed_is_named(write, monkeypatch):
    folder = write(*ANIMALS)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    refused(folder, r"cannot be listed \(Permission denied\)")
