import dataclasses
import json
import logging
import subprocess
import sys

import numpy as np
import pytest

from coat_deploy.errors import UsageError, WeightsError
from coat_deploy.network import weights
from coat_deploy.network.download import Download
from coat_deploy.network.variants import VARIANTS, Published, get_variant
from coat_deploy.network.weights import (
    Checkpoint,
    WeightsOptions,
    fit,
    load_checkpoint,
    read_safetensors,
    to_safetensors,
)
from coat_deploy.spec import ModelSpec, Preprocess, TimmForm, WeightsRecord

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from coat_deploy.digest import sha256_file  # noqa: E402
from coat_deploy.network.coat import create_network  # noqa: E402

TOYS = ("coat_toy", "coat_lite_toy")
ALL = tuple(name for name in VARIANTS if name not in TOYS)


def spec_of(name, num_classes=10, **model_args):
    features = get_variant(name).num_features
    return ModelSpec(name, num_classes, features, Preprocess((64, 64)), model_args=model_args)


def toy(name="coat_toy", seed=0):
    return dict(load_checkpoint(f"random:{seed}", spec_of(name)).tensors)


def write(tmp_path, tensors, name="weights.safetensors"):
    path = tmp_path / name
    path.write_bytes(to_safetensors(Checkpoint(tensors, WeightsRecord("test"))))
    return path


@pytest.mark.parametrize("name", TOYS)
def test_random_weights_load_strictly_into_the_network(name):
    checkpoint = load_checkpoint("random:7", spec_of(name))
    network = create_network(name, 10)
    network.load_state_dict({k: torch.from_numpy(v) for k, v in checkpoint.tensors.items()})
    assert list(checkpoint.tensors) == list(network.state_dict())
    assert checkpoint.record == WeightsRecord("random:7")


def test_random_without_a_seed_is_seed_zero():
    checkpoint = load_checkpoint("random", spec_of("coat_lite_toy"))
    assert checkpoint.record.source == "random:0"
    assert np.array_equal(checkpoint.tensors["head.bias"], toy("coat_lite_toy")["head.bias"])


@pytest.mark.parametrize("source", ["random:", "random:x", "random:-1", "random:1.5", "random:²"])
def test_a_seed_that_is_no_number_is_refused(source):
    with pytest.raises(UsageError, match="no seed"):
        load_checkpoint(source, spec_of("coat_lite_toy"))


@pytest.mark.parametrize("source", ["", "offical", "model.onnx", "https://example.org/a"])
def test_an_unknown_source_lists_the_known_ones(source):
    with pytest.raises(UsageError, match=r"random:SEED, official, timm, or a \.safetensors"):
        load_checkpoint(source, spec_of("coat_lite_toy"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.safetensors: no such file"):
        load_checkpoint(str(tmp_path / "none.safetensors"), spec_of("coat_lite_toy"))


@pytest.mark.parametrize("source", ["official", "timm"])
def test_a_variant_nobody_published_says_so(source):
    with pytest.raises(UsageError, match="nobody published weights of coat_toy"):
        load_checkpoint(source, spec_of("coat_toy"))


@pytest.mark.parametrize("name", TOYS)
def test_safetensors_come_back_bit_for_bit(tmp_path, name):
    tensors = toy(name)
    path = write(tmp_path, tensors)
    checkpoint = load_checkpoint(str(path), spec_of(name))
    assert all(np.array_equal(checkpoint.tensors[key], tensors[key]) for key in tensors)
    assert checkpoint.record == WeightsRecord(str(path), None, sha256_file(path))


def test_the_same_tensors_give_the_same_bytes():
    tensors = toy()
    reordered = dict(reversed(list(tensors.items())))
    first = to_safetensors(Checkpoint(tensors, WeightsRecord("a")))
    second = to_safetensors(Checkpoint(reordered, WeightsRecord("b")))
    assert first == second


def test_tensors_that_are_not_contiguous_are_written_as_they_are(tmp_path):
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(read_safetensors(write(tmp_path, {"a": matrix}))["a"], matrix)


def test_read_tensors_can_be_written_to(tmp_path):
    path = write(tmp_path, {"a": np.ones(3, np.float32)})
    assert read_safetensors(path)["a"].flags.writeable


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floating_point_types_become_float32(tmp_path, dtype):
    from safetensors.torch import save_file

    values = torch.tensor([1.5, -2.25, 0.0, 3e4])
    path = tmp_path / "a.safetensors"
    save_file({"a": values.to(getattr(torch, dtype))}, path)
    read = read_safetensors(path)["a"]
    assert read.dtype == np.float32
    assert np.array_equal(read, values.to(getattr(torch, dtype)).float().numpy())


def test_integers_are_no_weights(tmp_path):
    from safetensors.numpy import save_file

    save_file({"steps": np.arange(3)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"steps is no weight \(got type I64"):
        read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_safetensors_is_named(tmp_path, share):
    path = write(tmp_path, toy("coat_lite_toy"))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(WeightsError, match=r"weights\.safetensors: damaged") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff" * 64, b"<html>not found</html>", b"{}" * 20])
def test_something_else_called_safetensors_is_named(tmp_path, data):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"weights\.safetensors: damaged"):
        read_safetensors(path)


def test_a_file_too_large_for_a_coat_is_not_read(tmp_path, monkeypatch):
    path = write(tmp_path, {"a": np.ones(300, np.float32)})
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 1000)
    with pytest.raises(WeightsError, match="larger than 1000 bytes"):
        read_safetensors(path)


def test_reading_safetensors_does_not_import_torch(tmp_path):
    path = write(tmp_path, {"a": np.ones(3, np.float32)})
    code = (
        "import sys; from pathlib import Path\n"
        "from coat_deploy.network.weights import read_safetensors\n"
        "heavy = {'torch', 'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
        f"assert not heavy, heavy; read_safetensors(Path({str(path)!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_authors_checkpoint_loads(tmp_path):
    """Wrapped in "model", with norms that are never run."""
    tensors = {key: torch.from_numpy(value) for key, value in toy("coat_lite_toy").items()}
    for s, channels in enumerate(get_variant("coat_lite_toy").channels[:3], start=1):
        tensors |= {f"norm{s}.weight": torch.ones(channels), f"norm{s}.bias": torch.ones(channels)}
    torch.save({"model": tensors}, tmp_path / "coat.pth")
    checkpoint = load_checkpoint(str(tmp_path / "coat.pth"), spec_of("coat_lite_toy"))
    assert list(checkpoint.tensors) == list(toy("coat_lite_toy"))
    assert checkpoint.record.sha256 == sha256_file(tmp_path / "coat.pth")


def test_the_norms_that_coat_runs_are_kept():
    tensors = toy() | {"norm1.weight": np.ones(16, np.float32), "norm1.bias": np.ones(16)}
    fitted = fit(tensors, spec_of("coat_toy"))
    assert "norm1.weight" not in fitted
    assert "norm2.weight" in fitted


def test_one_key_is_enough_for_a_shared_parameter():
    tensors = toy()
    alone = {key: value for key, value in tensors.items() if ".cpe." not in key}
    alone = {key: value for key, value in alone.items() if ".mlp2." not in key}
    assert len(alone) < len(tensors)
    fitted = fit(alone, spec_of("coat_toy"))
    assert all(np.array_equal(fitted[key], tensors[key]) for key in tensors)


def test_a_shared_parameter_that_differs_is_refused_with_its_keys():
    tensors = toy()
    tensors["parallel_blocks.1.mlp3.fc1.bias"] = tensors["parallel_blocks.1.mlp3.fc1.bias"] + 1
    with pytest.raises(
        WeightsError, match=r"blocks\.1\.mlp3\.fc1\.bias and .*mlp2\.fc1\.bias diff"
    ):
        fit(tensors, spec_of("coat_toy"))


def test_missing_unexpected_and_misshapen_keys_are_named_in_one_error():
    tensors = toy("coat_lite_toy")
    del tensors["norm4.bias"]
    tensors["extra.weight"] = np.ones((2, 3), np.float32)
    tensors["cls_token1"] = np.ones((1, 1, 17), np.float32)
    with pytest.raises(WeightsError) as caught:
        fit(tensors, spec_of("coat_lite_toy"), subject="my.pth")
    message = str(caught.value)
    assert message.startswith("my.pth: does not fit coat_lite_toy with 10 classes: ")
    assert "1 missing: norm4.bias (40,)" in message
    assert "1 unexpected: extra.weight (2, 3)" in message
    assert "1 wrongly shaped: cls_token1 (got (1, 1, 17), expected (1, 1, 16))" in message
    assert "\n" not in message


def test_long_lists_of_keys_are_counted_and_cut():
    with pytest.raises(WeightsError) as caught:
        fit({f"k{n}": np.ones(1, np.float32) for n in range(50)}, spec_of("coat_lite_toy"))
    assert "50 unexpected: k0 (1,), k1 (1,)" in str(caught.value)
    assert "k7 (1,), ..." in str(caught.value)
    assert "k8" not in str(caught.value)


def test_a_missing_shared_parameter_counts_once():
    tensors = {key: value for key, value in toy().items() if "cpe2.proj.bias" not in key}
    tensors = {k: v for k, v in tensors.items() if k != "serial_blocks2.0.cpe.proj.bias"}
    with pytest.raises(WeightsError, match=r"1 missing: cpe2\.proj\.bias \(24,\)\."):
        fit(tensors, spec_of("coat_toy"))


def test_a_checkpoint_of_another_variant_says_which():
    with pytest.raises(WeightsError, match="It fits coat_toy"):
        fit(toy(), spec_of("coat_lite_toy"))


def test_other_classes_say_first_how_to_keep_them():
    with pytest.raises(WeightsError, match="It has 10 classes: to keep them, add --num-classes 10"):
        fit(toy(), dataclasses.replace(spec_of("coat_toy"), num_classes=3))


def test_other_classes_say_how_to_load_the_rest():
    with pytest.raises(WeightsError, match=r"head\.weight \(got \(10, 24\).*--replace-head"):
        fit(toy(), spec_of("coat_toy", 7))


def test_a_replaced_head_is_drawn_anew_and_the_rest_is_kept(caplog):
    tensors = toy()
    with caplog.at_level(logging.WARNING):
        fitted = fit(tensors, spec_of("coat_toy", 7), replace_head=True)
    assert fitted["head.weight"].shape == (7, 24)
    assert fitted["head.bias"].any()
    rest = [key for key in tensors if not key.startswith("head.")]
    assert all(np.array_equal(fitted[key], tensors[key]) for key in rest)
    assert "head drawn at random for 7 classes" in caplog.text


def test_a_head_is_replaced_when_a_file_is_loaded_so(tmp_path):
    path = write(tmp_path, toy("coat_lite_toy"))
    options = WeightsOptions(replace_head=True)
    first = load_checkpoint(str(path), spec_of("coat_lite_toy", 3), options)
    second = load_checkpoint(str(path), spec_of("coat_lite_toy", 3), options)
    assert np.array_equal(first.tensors["head.weight"], second.tensors["head.weight"])


def test_replacing_the_head_does_not_excuse_other_faults():
    tensors = toy()
    del tensors["norm4.bias"]
    with pytest.raises(WeightsError, match=r"1 missing: norm4\.bias"):
        fit(tensors, spec_of("coat_toy", 7), replace_head=True)


def test_no_classes_drop_the_head_when_asked():
    fitted = fit(toy("coat_lite_toy"), spec_of("coat_lite_toy", 0), replace_head=True)
    assert not any(key.startswith("head.") for key in fitted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_name_their_tensor(value):
    tensors = toy("coat_lite_toy")
    tensors["norm4.weight"] = tensors["norm4.weight"].copy()
    tensors["norm4.weight"][5] = value
    with pytest.raises(WeightsError, match=r"tensor norm4\.weight holds NaN or Inf"):
        fit(tensors, spec_of("coat_lite_toy"))


def test_a_float64_too_large_for_float32_is_refused(tmp_path):
    from safetensors.numpy import save_file

    tensors = toy("coat_lite_toy")
    save_file(tensors | {"norm4.bias": np.full(40, 1e300)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"norm4\.bias holds NaN or Inf"):
        load_checkpoint(str(tmp_path / "a.safetensors"), spec_of("coat_lite_toy"))


def test_a_network_without_cpe_does_not_take_its_weights():
    with pytest.raises(WeightsError, match=r"unexpected: cpe1\.proj\.weight"):
        fit(toy(), spec_of("coat_toy", cpe=False))


@pytest.fixture
def published_toy(monkeypatch):
    published = Published(0, 0, 0, 0, 0, 0, "coat_lite_toy_01234567.pth")
    row = dataclasses.replace(get_variant("coat_lite_toy"), published=published)
    monkeypatch.setitem(VARIANTS, "coat_lite_toy", row)
    return published


def test_the_official_source_records_url_and_hash(tmp_path, monkeypatch, published_toy):
    path = tmp_path / "coat.pth"
    torch.save({"model": {k: torch.from_numpy(v) for k, v in toy("coat_lite_toy").items()}}, path)
    asked = []

    def fetch(published, options):
        asked.append(published)
        return Download(path, "https://example.org/coat.pth", "ab" * 32)

    monkeypatch.setattr(weights, "fetch_official", fetch)
    checkpoint = load_checkpoint("official", spec_of("coat_lite_toy"))
    assert asked == [published_toy]
    assert checkpoint.record == WeightsRecord("official", "https://example.org/coat.pth", "ab" * 32)


def test_the_timm_source_asks_for_the_variants_repository(tmp_path, monkeypatch, published_toy):
    path = write(tmp_path, toy("coat_lite_toy"))
    asked = []

    def fetch(repository, options):
        asked.append(repository)
        return Download(path, "https://example.org/m", "cd" * 32)

    monkeypatch.setattr(weights, "fetch_hub", fetch)
    checkpoint = load_checkpoint("timm", spec_of("coat_lite_toy"))
    assert asked == ["timm/coat_lite_toy.in1k"]
    assert checkpoint.record == WeightsRecord("timm", "https://example.org/m", "cd" * 32)


@pytest.mark.parametrize("name", ALL)
def test_keys_and_shapes_are_those_of_timm(name, timm):
    with torch.device("meta"):
        form = get_variant(name).timm or TimmForm(name, {})
        theirs = timm.create_model(form.architecture, **form.args).state_dict()
    ours = weights.expected_shapes(spec_of(name, 1000))
    assert ours == {key: tuple(value.shape) for key, value in theirs.items()}


def test_timms_own_state_fits(timm):
    state = timm.create_model("coat_lite_tiny").state_dict()
    tensors = {key: value.numpy() for key, value in state.items()}
    assert fit(tensors, spec_of("coat_lite_tiny", 1000)).keys() == tensors.keys()


def test_timm_opens_what_is_written_strictly(tmp_path, timm):
    spec = spec_of("coat_tiny", 5)
    checkpoint = load_checkpoint("random:1", spec)
    write(tmp_path, checkpoint.tensors, "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(spec.to_json()))
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    state = network.state_dict()
    assert state.keys() == checkpoint.tensors.keys()
    assert all(np.array_equal(state[k].numpy(), v) for k, v in checkpoint.tensors.items())
