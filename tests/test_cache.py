import errno
import os

import pytest

from coat_deploy import cache
from coat_deploy.cache import compiled_folder, forget, holds_kept, keep, read_kept

FILES = {"a.onnx": "12" * 32, "a.proof.npz": "34" * 32}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where a file would be kept, before anything is."""
    monkeypatch.setenv("COAT_CACHE", str(tmp_path / "cache"))
    folder = compiled_folder("openvino", FILES)
    assert folder is not None and folder.parent == tmp_path / "cache" / "openvino"
    return folder / "one.compiled"


def test_what_is_kept_is_read_again(place):
    keep(place, b"com", memoryview(b"piled"))
    assert read_kept(place) == b"compiled"
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_what_was_never_kept_is_none(place):
    assert read_kept(place) is None
    assert not holds_kept(place.parent)


def test_what_is_kept_is_for_its_user_alone(place):
    keep(place, b"compiled")
    assert place.parent.parent.stat().st_mode & 0o077 == 0


def test_keeping_again_replaces(place):
    keep(place, b"old")
    keep(place, b"new")
    assert read_kept(place) == b"new"


def test_other_files_are_another_folder(place):
    other = compiled_folder("openvino", FILES | {"a.onnx": "56" * 32})
    assert other is not None and other != place.parent
    assert compiled_folder("openvino", dict(reversed(FILES.items()))) == place.parent


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "empty", "a folder"])
def test_what_is_damaged_is_as_if_never_kept(place, damage):
    keep(place, b"compiled" * 100)
    whole = place.read_bytes()
    place.unlink()
    if damage == "a folder":
        place.mkdir()
    else:
        flipped = bytearray(whole)
        flipped[200] ^= 1
        contents = {"flipped": flipped, "cut": whole[:-1], "longer": whole + b"x", "empty": b""}
        place.write_bytes(contents[damage])
    assert read_kept(place) is None


def test_a_folder_that_cannot_be_made_keeps_nothing(place):
    place.parents[2].write_text("a file where the cache should be")
    keep(place, b"compiled")
    assert read_kept(place) is None


@pytest.mark.parametrize("step", ["mkstemp", "replace"])
def test_a_full_disk_keeps_nothing_and_leaves_nothing(place, monkeypatch, step):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.tempfile if step == "mkstemp" else os, step, full)
    keep(place, b"compiled")
    assert list(place.parent.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(place, monkeypatch):
    def interrupted(*_parts):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        keep(place, b"compiled")
    assert list(place.parent.iterdir()) == []


def test_what_was_not_used_for_longest_makes_room(place, monkeypatch):
    shelf = place.parent.parent
    first, second, third = (shelf / name / "one.compiled" for name in ("1", "2", "3"))
    for seconds, path in enumerate((first, second), start=1000):
        keep(path, bytes(100))
        os.utime(path, (seconds, seconds))
    assert read_kept(first) is not None  # used now, so the second is the older
    monkeypatch.setattr(cache, "MAX_KEPT_BYTES", 300)
    keep(third, bytes(100))
    assert (holds_kept(first.parent), second.parent.exists(), holds_kept(third.parent)) == (
        True, False, True,
    )  # fmt: skip


def test_what_is_forgotten_is_gone_and_nothing_else(place):
    keep(place, b"compiled")
    (place.parent / "notes.txt").write_text("not ours")
    forget(place.parent)
    assert read_kept(place) is None
    assert (place.parent / "notes.txt").exists()


def test_forgetting_what_is_not_there_is_no_error(tmp_path):
    forget(tmp_path / "nowhere")


def test_a_user_without_a_home_has_no_place(monkeypatch):
    def homeless(_path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "expanduser", homeless)
    assert compiled_folder("openvino", FILES) is None
