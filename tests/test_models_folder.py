"""The folder models/: what is published in it, and that timm opens what an export makes of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from coat_deploy.json_files import json_bytes
from coat_deploy.model import Model
from coat_deploy.network.variants import VARIANTS
from coat_deploy.repository import Repository, published_configs, read_labels
from coat_deploy.spec import WeightsRecord

MODELS = Path(__file__).resolve().parents[1] / "models"
NAMES = sorted(name for name, variant in VARIANTS.items() if variant.published)


def test_every_published_variant_has_a_config_and_nothing_else_has():
    assert sorted(path.parent.name for path in MODELS.glob("*/config.json")) == NAMES


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def spec(name):
    return Model(MODELS / name).spec


def test_a_published_config_is_called_by_its_architecture(name, spec):
    assert spec.architecture == name


def test_a_published_config_is_written_as_an_export_would(name, spec):
    assert (MODELS / name / "config.json").read_bytes() == json_bytes(spec.to_json())


def test_a_published_config_has_the_variants_sizes(name, spec):
    variant = VARIANTS[name]
    assert spec.num_features == variant.num_features
    assert spec.preprocess.input_size == (variant.input_size, variant.input_size)


def test_a_published_config_says_where_its_weights_are(spec):
    assert spec.weights == WeightsRecord("timm")


def test_a_published_config_has_a_label_for_every_class(spec):
    assert len(set(read_labels(spec))) > 990  # two birds and two machines share their names


def test_a_published_config_is_timms(timm, name, spec):
    cfg, how = timm.get_pretrained_cfg(f"{name}.in1k"), spec.preprocess
    assert (3, *how.input_size) == cfg.input_size
    assert (how.mean, how.std) == (cfg.mean, cfg.std)
    assert (how.crop_pct, how.crop_mode) == (cfg.crop_pct, cfg.crop_mode)
    assert (how.interpolation, spec.num_classes) == (cfg.interpolation, cfg.num_classes)


def test_a_published_config_keeps_timms_names_of_layers(timm, name):
    document = json.loads((MODELS / name / "config.json").read_text())["pretrained_cfg"]
    cfg = timm.get_pretrained_cfg(f"{name}.in1k")
    assert (document["first_conv"], document["classifier"]) == (cfg.first_conv, cfg.classifier)


def test_published_models_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.delenv("COAT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert [model.name for model in Repository.open().models()] == NAMES


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """coat_lite_mini, exported with random weights to a folder of its own."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from coat_deploy.export import ExportOptions, export

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = tmp_path_factory.mktemp("models")
    options = ExportOptions(weights="random:0", validate=False, threads=1)
    repository = Repository((models, published_configs()))
    yield export(repository, "coat_lite_mini", options).model
    torch.set_num_threads(threads)


def test_timm_opens_an_exported_folder_and_computes_the_same(timm, exported):
    import torch

    from coat_deploy.backends import eager
    from coat_deploy.runner import LoadOptions

    theirs = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    pixels = np.random.Generator(np.random.PCG64(0)).normal(0, 1, (2, 3, 224, 224))
    pixels = pixels.astype(np.float32)
    with eager.load(exported.folder, LoadOptions(threads=1)) as runner:
        ours = runner.run(pixels)["logits"]
    with torch.inference_mode():
        logits = theirs(torch.from_numpy(pixels)).numpy()
    assert np.std(ours) > 0.1  # or any weights would do
    assert np.abs(logits - ours).max() < 1e-4


def test_timm_loads_every_weight_of_an_exported_folder(timm, exported):
    """timm is told to be strict: no key may be missing or left over."""
    from safetensors.torch import load_file

    network = timm.create_model(exported.spec.architecture, pretrained=False)
    found = network.load_state_dict(load_file(exported.weights_path), strict=True)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])


def test_timm_reads_the_preprocessing_of_an_exported_folder(timm, exported):
    network = timm.create_model(f"local-dir:{exported.folder}", pretrained=False)
    config = timm.data.resolve_data_config(model=network)
    how = exported.spec.preprocess
    assert tuple(config["input_size"]) == (3, *how.input_size)
    assert (tuple(config["mean"]), tuple(config["std"])) == (how.mean, how.std)
    assert (config["crop_pct"], config["interpolation"]) == (how.crop_pct, how.interpolation)


def test_an_export_takes_the_published_config_along(exported):
    assert exported.spec == Model(MODELS / "coat_lite_mini").spec


def test_a_config_that_timm_writes_is_read(timm, tmp_path):
    network = timm.create_model("coat_lite_tiny", pretrained=False)
    timm.models._hub.save_config_for_hf(network, tmp_path / "config.json")
    ours, published = Model(tmp_path).spec, Model(MODELS / "coat_lite_tiny").spec
    assert ours.architecture == "coat_lite_tiny"
    assert (ours.num_classes, ours.num_features) == (1000, published.num_features)
    assert ours.preprocess == published.preprocess


def test_timm_opens_a_published_folder_as_it_is(timm):
    network = timm.create_model(f"local-dir:{published_configs() / 'coat_lite_mini'}")
    assert network.num_classes == 1000
    assert network.pretrained_cfg["architecture"] == "coat_lite_mini"
