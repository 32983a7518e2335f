import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from coat_deploy import transaction
from coat_deploy.errors import RepositoryError
from coat_deploy.transaction import UNDO, aside, locked, move_in, settle, write_file

OLD = {"config.json": "old", "1/x.onnx": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "1/x.onnx": "new", "1/y.onnx": "new"}


@pytest.fixture
def folder(tmp_path):
    """A folder with the old files."""
    place = tmp_path / "model"
    for name, content in OLD.items():
        write_file(place / name, content.encode())
    return place


def files(folder):
    """Everything in a folder, hidden or not, by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def change(folder):
    """Write the new files, as one."""
    with aside(folder) as place:
        for name, content in NEW.items():
            write_file(place / name, content.encode())
        with locked(folder):
            move_in(place, folder, list(NEW))


class At:
    """A function that lets `error` happen at its `count`-th call, before or after its work."""

    def __init__(self, function, count, error, after=False):
        self.function, self.left, self.error, self.after = function, count, error, after

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        result = self.function(*args, **kwargs)
        if self.left == 0:
            raise self.error
        return result


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
# os.replace: .undo into place, four files, .undo away.
STEPS = range(1, 7)


def test_all_files_are_new_afterwards(folder):
    change(folder)
    assert files(folder) == NEW


def test_nothing_hidden_stays(folder):
    change(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "1"}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["no space", "ctrl-c"])
def test_a_failure_at_any_step_leaves_what_was_there(folder, monkeypatch, step, error):
    monkeypatch.setattr(os, "replace", At(os.replace, step, error))
    with pytest.raises(type(error)):
        change(folder)
    monkeypatch.undo()
    assert files(folder) == OLD


@pytest.mark.parametrize("step", STEPS)
def test_ctrl_c_after_any_step_leaves_all_or_nothing(folder, monkeypatch, step):
    monkeypatch.setattr(os, "replace", At(os.replace, step, KeyboardInterrupt(), after=True))
    with pytest.raises(KeyboardInterrupt):
        change(folder)
    monkeypatch.undo()
    assert files(folder) == (NEW if step == STEPS[-1] else OLD)


@pytest.mark.parametrize("call", ["link", "fsync", "mkdir"])
def test_a_failed_preparation_leaves_what_was_there(folder, monkeypatch, call):
    with aside(folder) as place:
        for name, content in NEW.items():
            write_file(place / name, content.encode())
        monkeypatch.setattr(os, call, At(getattr(os, call), 1, NO_SPACE))
        if call == "link":  # where there are no hard links, copies are kept
            monkeypatch.setattr(transaction.shutil, "copy2", At(None, 1, NO_SPACE))
        with pytest.raises((OSError, RepositoryError), match="No space"), locked(folder):
            move_in(place, folder, list(NEW))
        monkeypatch.undo()
    assert files(folder) == OLD


def test_without_hard_links_old_files_are_put_back_from_copies(folder, monkeypatch):
    monkeypatch.setattr(os, "link", At(os.link, 1, OSError(errno.EPERM, "no links here")))
    monkeypatch.setattr(os, "replace", At(os.replace, 4, NO_SPACE))
    with pytest.raises(OSError, match="No space"):
        change(folder)
    monkeypatch.undo()
    assert files(folder) == OLD


KILLED = """
import os, signal, sys
from pathlib import Path
from coat_deploy.transaction import aside, locked, move_in, write_file
folder, step, new = Path(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
def dying(function):
    def call(*args, **kwargs):
        global step
        if step == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        step -= 1
        return function(*args, **kwargs)
    return call
os.replace = dying(os.replace)
with aside(folder) as place:
    for name, content in new.items():
        write_file(place / name, content.encode())
    if step < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with locked(folder):
        move_in(place, folder, list(new))
"""


def kill_at(folder, step):
    """Run the change in a process that is killed before its `step`-th rename (-1: before all)."""
    command = [sys.executable, "-c", KILLED, str(folder), str(step), repr(NEW)]
    done = subprocess.run(command, timeout=60, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def visible(folder):
    return {name: text for name, text in files(folder).items() if not name.startswith(".")}


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_kill_between_renames_is_undone_by_who_comes_next(folder, step):
    kill_at(folder, step)
    settle(folder)
    assert visible(folder) == OLD


def test_a_kill_before_the_renames_leaves_only_hidden_files(folder):
    kill_at(folder, -1)
    assert visible(folder) == OLD


@pytest.mark.parametrize("step", [-1, 3])
def test_the_next_change_clears_away_what_a_kill_left(folder, step):
    kill_at(folder, step)
    change(folder)
    assert files(folder) == NEW


@pytest.mark.parametrize("call", ["replace", "unlink"])
@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_undoing_is_finished_by_the_next(folder, monkeypatch, call, step):
    kill_at(folder, 5)
    broken = At(getattr(os, call), step, KeyboardInterrupt(), after=True)
    monkeypatch.setattr(os, call, broken)
    with pytest.raises(KeyboardInterrupt):
        settle(folder)
    monkeypatch.undo()
    settle(folder)
    assert visible(folder) == OLD


def test_settling_leaves_a_sound_folder_alone(folder):
    settle(folder)
    assert files(folder) == OLD


def test_settling_waits_for_who_holds_the_lock(folder):
    with locked(folder):
        (folder / UNDO).mkdir()  # as if a change were under way
        waiting = threading.Thread(target=settle, args=(folder,))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        (folder / UNDO).rmdir()
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize(
    "journal",
    [
        {"replaced": [], "added": ["../precious"]},
        {"replaced": [], "added": ["1/../../precious"]},
        {"replaced": [], "added": ["link/precious"]},
        {"replaced": ["../precious"], "added": []},
        {"replaced": [], "added": [3]},
        {"replaced": []},
        [],
    ],
)
def test_a_strangers_undo_cannot_reach_outside_the_folder(folder, tmp_path, journal):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    write_file(folder / UNDO / "old" / "x", b"")
    write_file(folder / "precious", b"theirs")
    (folder / UNDO / "precious").write_text("theirs")  # what "old/../precious" would be
    (folder / UNDO / "undo.json").write_text(json.dumps(journal))
    with pytest.raises(RepositoryError, match="cannot be undone"):
        settle(folder)
    assert precious.read_text() == "mine"


def test_an_absolute_path_in_a_strangers_undo_is_refused(folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    write_file(folder / UNDO / "undo.json", b"")
    journal = {"replaced": [], "added": [str(precious)]}
    (folder / UNDO / "undo.json").write_text(json.dumps(journal))
    with pytest.raises(RepositoryError, match="cannot be undone"):
        settle(folder)
    assert precious.exists()


def test_a_folder_aside_is_hidden(folder):
    with aside(folder) as place:
        assert place.name.startswith(".")


def test_a_folder_aside_is_gone_after_an_error(folder):
    with pytest.raises(ZeroDivisionError), aside(folder) as place:
        write_file(place / "x", b"x")
        raise ZeroDivisionError
    assert files(folder) == OLD


def test_folders_made_for_nothing_are_removed_again(tmp_path):
    with aside(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays_even_if_empty(tmp_path):
    with aside(tmp_path):
        pass
    assert tmp_path.is_dir()


def test_a_folder_aside_of_a_living_process_is_not_cleared(folder):
    with aside(folder) as first, aside(folder):
        assert first.is_dir()


def test_an_abandoned_folder_aside_is_cleared(folder):
    write_file(folder / ".staging-old" / "1" / "x.onnx", b"half")
    with aside(folder):
        assert not (folder / ".staging-old").exists()


def test_a_link_called_like_a_folder_aside_is_left_alone(folder, tmp_path):
    write_file(tmp_path / "precious" / "x", b"mine")
    (folder / ".staging-x").symlink_to(tmp_path / "precious")
    with aside(folder):
        pass
    assert (tmp_path / "precious" / "x").exists()


def test_a_folder_removed_by_another_process_is_made_again(folder, monkeypatch):
    gone = FileNotFoundError(errno.ENOENT, "gone")
    monkeypatch.setattr(tempfile, "mkdtemp", At(tempfile.mkdtemp, 1, gone))
    with aside(folder) as place:
        assert place.is_dir()


def test_a_file_in_the_way_of_a_folder_is_one_clear_line(tmp_path):
    (tmp_path / "models").write_text("a file")
    message = "models/coat_tiny: cannot be written .*; what was there is unchanged. Free space"
    with pytest.raises(RepositoryError, match=message), aside(tmp_path / "models" / "coat_tiny"):
        pass


@pytest.fixture
def read_only():
    """A folder that may not be written, even when the tests run as root."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place) / "models"
        folder.mkdir()
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_read_only_folder_is_one_clear_line(read_only):
    message = r"cannot be written \(Permission denied\).*choose another folder"
    with pytest.raises(RepositoryError, match=message), aside(read_only / "coat_tiny"):
        pass


def test_a_locked_folder_keeps_others_out_until_it_is_released(folder):
    order = []

    def second():
        with locked(folder):
            order.append("second")

    with locked(folder):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
