import contextlib
import errno
import os
import pickle
import resource
from collections import OrderedDict
from dataclasses import asdict

import pytest
import torch

from coat_deploy.errors import TrainingError
from coat_deploy.train import checkpoint as module
from coat_deploy.train.checkpoint import FILE, FORMAT, Checkpoint, Position, load_checkpoint


def checkpoint(step=1, network=None):
    tensors = network or {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([0.1 + step])}
    return Checkpoint(
        run={"variant": "coat_lite_toy", "classes": ["猫", "dog"], "epochs": 3, "flip": 0.5},
        position=Position(step=step, loss_sum=1 / 3, best_top1=0.5, stale=2),
        network=tensors,
        optimiser={
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0], "fused": True}],
        },
        average=OrderedDict(tensors),
        updates=step,
        scaler={"scale": 65536.0, "_growth_tracker": 3},
        best={"a": torch.ones(1)},
    )


def large():
    return checkpoint(2, {"a": torch.randn(300_000)})


@contextlib.contextmanager
def largest_file(size):
    """Let no file grow beyond a size: the disk as a full one, without filling it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_kept(folder, step=1):
    """The checkpoint of `step` is whole, and nothing lies beside it."""
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert load_checkpoint(folder).position.step == step


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
    saved = checkpoint()
    assert saved.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / FILE
    loaded = load_checkpoint(tmp_path / "new" / "folder")
    assert asdict(loaded.position) == asdict(saved.position)
    for name in ("run", "updates", "scaler"):
        assert getattr(loaded, name) == getattr(saved, name)
    for name in ("network", "average", "best"):
        found, expected = getattr(loaded, name), getattr(saved, name)
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert loaded.optimiser["param_groups"] == saved.optimiser["param_groups"]
    moments = saved.optimiser["state"][0]["exp_avg"]
    assert torch.equal(loaded.optimiser["state"][0]["exp_avg"], moments)


def test_where_there_is_no_checkpoint_none_is_loaded(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_a_new_checkpoint_takes_the_place_of_the_last(tmp_path):
    checkpoint(1).save(tmp_path)
    checkpoint(2).save(tmp_path)
    assert_kept(tmp_path, 2)


@pytest.mark.parametrize("size", [0, 1000, 600_000])
def test_a_disk_that_fills_up_keeps_the_last_one(tmp_path, size):
    checkpoint().save(tmp_path)
    with pytest.raises(TrainingError, match="the last one is kept.*--resume"), largest_file(size):
        large().save(tmp_path)
    assert_kept(tmp_path)


def test_a_disk_that_is_full_at_the_first_save_leaves_nothing(tmp_path):
    with pytest.raises(TrainingError, match="there is none yet"), largest_file(1000):
        large().save(tmp_path / "training")
    assert list((tmp_path / "training").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: write failed\nat x"),
         "PytorchStreamWriter failed writing file data/3: write failed"),
        (OSError(), "OSError"),
    ],
)  # fmt: skip
def test_a_writer_that_fails_half_way_keeps_the_last_one(tmp_path, monkeypatch, error, reason):
    checkpoint().save(tmp_path)

    def write_half(document, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(TrainingError) as caught:
        checkpoint(2).save(tmp_path)
    assert f"({reason}); the last one is kept" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_kept(tmp_path)


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes_with_the_next(tmp_path, monkeypatch):
    class Kill(BaseException):
        pass

    def die(handle):
        raise Kill

    checkpoint().save(tmp_path)
    monkeypatch.setattr(module.os, "fsync", die)
    with pytest.raises(Kill):
        checkpoint(2).save(tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    assert load_checkpoint(tmp_path).position.step == 1
    checkpoint(3).save(tmp_path)
    assert_kept(tmp_path, 3)


def test_bytes_are_on_the_disk_before_the_name_is_theirs(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(module.os, "fsync", lambda handle: (fsync(handle), done.append("sync")))
    monkeypatch.setattr(module.os, "replace", lambda *a: (replace(*a), done.append("rename")))
    checkpoint().save(tmp_path)
    assert done == ["sync", "rename"]


def test_a_folder_that_cannot_be_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TrainingError, match="cannot be written .*; there is none yet"):
            checkpoint().save(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_do_not_replace_good_ones(tmp_path, value):
    """A finite loss may have a gradient that is not: the weights are lost before it shows."""
    checkpoint().save(tmp_path)
    with pytest.raises(TrainingError, match="NaN or Inf; the last one is kept"):
        checkpoint(2, {"a": torch.tensor([1.0, value])}).save(tmp_path)
    assert_kept(tmp_path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", ["torch", "torch, legacy", "pickle"])
def test_nothing_that_a_checkpoint_pickles_is_run(tmp_path, write):
    document = {"format": FORMAT, "run": Evil(tmp_path / "run")}
    if write == "pickle":
        (tmp_path / FILE).write_bytes(pickle.dumps(document, protocol=2))
    else:
        legacy = {"_use_new_zipfile_serialization": write == "torch"}
        torch.save(document, tmp_path / FILE, **legacy)
    with pytest.raises(TrainingError, match="holds more than data, or is damaged") as caught:
        load_checkpoint(tmp_path)
    assert not (tmp_path / "run").exists()
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_one_clear_line(tmp_path, share):
    path = large().save(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(TrainingError, match="damaged.*begin anew with --overwrite") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def rewritten(path, change):
    document = torch.load(path, weights_only=True)
    torch.save(change(document), path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d | {"format": FORMAT + 1}, f"another version .got format {FORMAT + 1}"),
        (lambda d: {k: v for k, v in d.items() if k != "average"}, "damaged"),
        (lambda d: d | {"position": {"stride": 1}}, "damaged"),
        (lambda d: {}, "damaged"),
        (lambda d: [d], "damaged"),
        (lambda d: torch.zeros(3), "damaged"),
    ],
)
def test_a_file_of_another_kind_is_one_clear_line(tmp_path, change, words):
    rewritten(checkpoint().save(tmp_path), change)
    with pytest.raises(TrainingError, match=words) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_may_not_be_read_says_so(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(TrainingError, match="cannot be read .Is a directory"):
        load_checkpoint(tmp_path)
