import argparse
import logging
import os
import zipfile

import numpy as np
import pytest

from coat_deploy.errors import WeightsError
from coat_deploy.network import pickled
from coat_deploy.network.pickled import read_pickled

torch = pytest.importorskip("torch")

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def saved(tmp_path, document, name="weights.pth"):
    path = tmp_path / name
    torch.save(document, path)
    return path


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin"])
def test_a_bare_state_dict_is_read(tmp_path, name):
    tensors = read_pickled(saved(tmp_path, STATE, name))
    assert tensors["a.weight"].dtype == np.float32
    assert np.array_equal(tensors["a.weight"], STATE["a.weight"].numpy())


@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_weights_are_found_where_training_scripts_put_them(tmp_path, key):
    document = {key: STATE, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    assert list(read_pickled(saved(tmp_path, document))) == list(STATE)


def test_the_choice_among_several_weights_is_logged(tmp_path, caplog):
    document = {"model_ema": {"b": torch.zeros(1)}, "model": STATE}
    with caplog.at_level(logging.WARNING):
        assert list(read_pickled(saved(tmp_path, document))) == list(STATE)
    assert "taking 'model'" in caplog.text


def test_prefixes_of_data_parallel_training_are_dropped(tmp_path):
    document = {"model": {f"module.{key}": value for key, value in STATE.items()}}
    assert list(read_pickled(saved(tmp_path, document))) == list(STATE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_become_float32_and_it_is_logged(tmp_path, dtype, caplog):
    path = saved(tmp_path, {key: value.to(dtype) for key, value in STATE.items()})
    with caplog.at_level(logging.INFO):
        tensors = read_pickled(path)
    assert tensors["a.weight"].dtype == np.float32
    assert np.array_equal(tensors["a.weight"], STATE["a.weight"].numpy())
    assert f"converted from {dtype}" in caplog.text


def test_the_format_before_zip_is_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert np.array_equal(read_pickled(path)["a.bias"], [1, 1])


class Trap:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    trapped = tmp_path / "trapped"
    path = saved(tmp_path, {"model": STATE, "epoch": Trap(str(trapped))})
    with pytest.raises(WeightsError, match=r"weights.pth: refused.*mkdir") as caught:
        read_pickled(path)
    assert not trapped.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, share):
    path = saved(tmp_path, STATE)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(WeightsError, match="weights.pth: damaged") as caught:
        read_pickled(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"not a checkpoint", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(99)]
)
def test_something_else_is_named(tmp_path, data):
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="weights.pth"):
        read_pickled(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match="none.pth: cannot be read"):
        read_pickled(tmp_path / "none.pth")


@pytest.mark.parametrize("document", [[1, 2], {1: torch.ones(1)}, {"model": {2: 3}}])
def test_what_is_no_state_dict_is_refused(tmp_path, document):
    with pytest.raises(WeightsError, match="no state_dict"):
        read_pickled(saved(tmp_path, document))


def test_what_is_no_tensor_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"a\.bias is no tensor \(got int\)"):
        read_pickled(saved(tmp_path, {"a.bias": 3}))


def test_integers_are_no_weights(tmp_path):
    with pytest.raises(WeightsError, match=r"steps is no weight \(got type torch.int64\)"):
        read_pickled(saved(tmp_path, {"steps": torch.tensor(3)}))


def test_a_tensor_that_claims_more_than_it_stores_is_refused(tmp_path):
    path = saved(tmp_path, {"a.weight": torch.zeros(1).expand(1 << 40)})
    with pytest.raises(WeightsError, match="unpacked"):
        read_pickled(path)


def test_a_file_that_unpacks_to_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(100_000))
    monkeypatch.setattr(pickled, "MAX_FILE_BYTES", 50_000)
    assert path.stat().st_size < 50_000
    with pytest.raises(WeightsError, match="larger than 50000 bytes"):
        read_pickled(path)
