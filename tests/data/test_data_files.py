"""Files of tables by path, folder and glob."""

import io
import tarfile

import pytest

from coat_deploy.data.data_files import count_in_tars, find_data_files
from coat_deploy.errors import UsageError


@pytest.fixture
def touch(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return touch


def found(pattern, root, names=()):
    files = find_data_files(str(pattern), (".parquet",), f"parquet:{pattern}", names)
    return {split: [file.removeprefix(f"{root}/") for file in of] for split, of in files.items()}


def test_a_file_is_the_training_split(touch):
    root = touch("a.parquet", "b.parquet")
    assert found(root / "a.parquet", root) == {"train": ["a.parquet"]}


def test_a_file_of_any_suffix_can_be_named(touch):
    root = touch("a.pq")
    assert found(root / "a.pq", root) == {"train": ["a.pq"]}


def test_splits_are_told_by_the_words_of_file_names(touch):
    root = touch(
        "data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet",
        "data/clothes_val.parquet", "data/test0.parquet", "data/readme.md",
    )  # fmt: skip
    assert found(root / "data", root) == {
        "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        "val": ["data/clothes_val.parquet"],
        "test": ["data/test0.parquet"],
    }


def test_splits_are_told_by_folders_first(touch):
    root = touch("validation/train.parquet", "train/x.parquet")
    assert found(root, root) == {
        "train": ["train/x.parquet"],
        "validation": ["validation/train.parquet"],
    }


def test_part_of_a_word_is_no_split(touch):
    root = touch("trainer.parquet", "latest.parquet")
    assert found(root, root) == {"train": ["latest.parquet", "trainer.parquet"]}


def test_glob_is_told_apart_below_its_fixed_part(touch):
    root = touch(
        "test set/val-0.parquet", "test set/train-0.parquet", "test set/deep/val-1.parquet"
    )
    assert found(root / "test set" / "*.parquet", root) == {
        "train": ["test set/train-0.parquet"],
        "val": ["test set/val-0.parquet"],
    }
    assert found(root / "test set" / "**" / "val*", root) == {
        "val": ["test set/deep/val-1.parquet", "test set/val-0.parquet"]
    }


def test_further_names_of_splits_count(touch):
    root = touch("mine-0.parquet", "yours-0.parquet")
    assert found(root, root, ("mine", "yours", None)) == {
        "mine": ["mine-0.parquet"], "yours": ["yours-0.parquet"],
    }  # fmt: skip


def test_file_that_names_no_split_beside_some_that_do_is_refused(touch):
    root = touch("train.parquet", "other.parquet")
    with pytest.raises(UsageError, match=r"other\.parquet: names no split, while .* \(got train\)"):
        found(root, root)


@pytest.mark.parametrize("pattern", ["gone.parquet", "gone/*.parquet", "."])
def test_nothing_found_says_what_is_expected(touch, pattern):
    root = touch("notes.txt")
    with pytest.raises(UsageError, match=r"no such file .*end in \.parquet, or a glob"):
        found(root / pattern, root)


def test_an_address_is_refused():
    with pytest.raises(UsageError, match=r"parquet:https://.* an address.* hub:OWNER/NAME"):
        found("https://somewhere/x.parquet", "")


def write_tar(path, *names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    return str(path)


def test_samples_of_tars_are_counted_from_their_headers(tmp_path):
    first = write_tar(tmp_path / "0.tar", "a/1.jpg", "a/1.cls", "a/2.jpg", "a/2.cls")
    second = write_tar(tmp_path / "1.tar", "3.jpg", "3.seg.jpg", "3.cls")
    assert count_in_tars([first, second], "jpg") == 3


def test_what_is_no_tar_is_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UsageError, match=r"x\.tar: no whole tar file"):
        count_in_tars([str(tmp_path / "x.tar")], "jpg")
