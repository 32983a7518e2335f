"""Finding images in files and folders, with the labels of class folders."""

import os
from pathlib import Path

import pytest

from coat_deploy.errors import UsageError
from coat_deploy.image_files import SUFFIXES, LabelledImage, find_images, find_labelled_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "dog/b.JPG", "cat/2.png", "cat/10.webp", "cat/old/1.tiff", "top.jpeg",
        "notes.txt", ".hidden.png", ".cache/x.png", "cat/.y.png", "empty/readme.md",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_images_are_found_by_suffix_in_a_stable_order(folder):
    found = [path.relative_to(folder).as_posix() for path in find_images([folder])]
    assert found == ["cat/10.webp", "cat/2.png", "cat/old/1.tiff", "dog/b.JPG", "top.jpeg"]


def test_label_is_the_first_folder_below(folder):
    labels = {i.path.name: i.label for i in find_labelled_images([folder])}
    assert labels == {
        "10.webp": "cat", "2.png": "cat", "1.tiff": "cat", "b.JPG": "dog", "top.jpeg": None,
    }  # fmt: skip


def test_only_the_folder_itself_without_recursion(folder):
    assert find_images([folder], recursive=False) == [folder / "top.jpeg"]


def test_named_file_is_taken_whatever_its_suffix(folder):
    assert find_labelled_images([folder / "notes.txt"]) == [LabelledImage(folder / "notes.txt")]


def test_order_of_arguments_is_kept_and_repeats_count_once(folder):
    found = find_images([folder / "dog", folder / "cat" / "2.png", folder / "cat"])
    assert [path.name for path in found] == ["b.JPG", "2.png", "10.webp", "1.tiff"]


def test_linked_class_folder_is_followed_and_a_loop_ends(folder):
    (folder / "wolf").symlink_to(folder / "dog", target_is_directory=True)
    (folder / "dog" / "up").symlink_to(folder, target_is_directory=True)
    labelled = [(i.path.name, i.label) for i in find_labelled_images([folder])]
    assert labelled[-3:] == [("b.JPG", "dog"), ("top.jpeg", None), ("b.JPG", "wolf")]


def test_missing_path_is_named(folder):
    with pytest.raises(UsageError, match="gone: no such file or folder"):
        find_images([folder, folder / "gone"])


def test_folder_without_images_says_which_suffixes_are_read(folder):
    with pytest.raises(UsageError, match=r"empty: no image in this folder .*\.bmp.*\.webp"):
        find_images([folder, folder / "empty"])


def test_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"cannot be listed \(Permission denied\)"):
        find_images([folder])


def test_every_suffix_is_lower_case_with_a_dot():
    assert all(suffix.startswith(".") and suffix.islower() for suffix in SUFFIXES)
