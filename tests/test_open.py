import dataclasses
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from coat_deploy import open as open_module  # noqa: E402
from coat_deploy.backends.select import backend  # noqa: E402
from coat_deploy.cache import compiled_folder  # noqa: E402
from coat_deploy.digest import sha256_bytes  # noqa: E402
from coat_deploy.errors import (  # noqa: E402
    BelowBar,
    CorruptArtifact,
    RepositoryError,
    StaleArtifact,
    UsageError,
    WeightsError,
)
from coat_deploy.export import ExportOptions, export  # noqa: E402
from coat_deploy.measure.proof import Proof  # noqa: E402
from coat_deploy.model import ArtifactQuery, Model  # noqa: E402
from coat_deploy.open import find_source, load_unchecked, open_source, selftest  # noqa: E402
from coat_deploy.repository import Repository  # noqa: E402
from coat_deploy.runner import LoadOptions  # noqa: E402
from coat_deploy.spec import ModelSpec, Preprocess  # noqa: E402

SPEC = ModelSpec("coat_lite_toy", 10, 40, Preprocess((64, 64)))
ORT, EAGER = ArtifactQuery("onnxruntime"), ArtifactQuery("eager")
ONE_THREAD = LoadOptions(threads=1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Toys are too small for threads: on busy cores they only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A model with an artifact, exported once."""
    models = tmp_path_factory.mktemp("template")
    (models / "mine").mkdir()
    (models / "mine" / "config.json").write_text(json.dumps(SPEC.to_json()))
    options = ExportOptions(weights="random:0", threads=1)
    return export(Repository.open(models), "mine", options).model.folder


@pytest.fixture
def folder(template, tmp_path):
    """A copy of the model, to be damaged."""
    return shutil.copytree(template, tmp_path / "mine")


def opened(folder, query=ORT):
    return open_source(find_source(Model(folder), query), ONE_THREAD)


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_sound_artifact_opens_and_runs(folder):
    with opened(folder) as runner:
        assert runner.run(np.zeros((2, 3, 64, 64), np.float32))["logits"].shape == (2, 10)


def test_eager_opens_and_runs(folder):
    with opened(folder, EAGER) as runner:
        assert runner.run(np.zeros((2, 3, 64, 64), np.float32))["logits"].shape == (2, 10)


def test_the_proof_can_be_replayed_for_its_figures(folder):
    model = Model(folder)
    with opened(folder) as runner:
        assert selftest(model, model.artifacts[0], runner).max_abs_difference < 1e-4


def test_other_weights_are_refused(folder):
    flip_bit(folder / "model.safetensors")
    with pytest.raises(StaleArtifact, match="exported from another model.safetensors"):
        opened(folder)


def test_an_artifact_that_travels_without_weights_is_opened_and_proven(folder):
    (folder / "model.safetensors").unlink()
    opened(folder)


def test_another_config_is_refused(folder):
    spec = dataclasses.replace(SPEC, preprocess=dataclasses.replace(SPEC.preprocess, crop_pct=1.0))
    (folder / "config.json").write_text(json.dumps(spec.to_json()))
    with pytest.raises(StaleArtifact, match="exported from another config.json"):
        opened(folder)


@pytest.mark.parametrize("file", ["onnxruntime-fp32.onnx", "onnxruntime-fp32.proof.npz"])
def test_a_flipped_bit_is_refused(folder, file):
    flip_bit(folder / "1" / file)
    with pytest.raises(CorruptArtifact, match=f"{file}: the file is not the one that was exported"):
        opened(folder)


@pytest.mark.parametrize("file", ["onnxruntime-fp32.onnx", "onnxruntime-fp32.proof.npz"])
def test_a_missing_file_is_refused(folder, file):
    (folder / "1" / file).unlink()
    with pytest.raises(CorruptArtifact, match=f"{file}: the file is missing. Run: coat-deploy"):
        opened(folder)


def test_a_cut_graph_is_refused(folder):
    path = folder / "1" / "onnxruntime-fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CorruptArtifact):
        opened(folder)


def replace_files(folder, contents):
    """Put other contents in place of an artifact's files, with their digests in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for file, content in contents.items():
        (folder / "1" / file).write_bytes(content)
        manifest["artifacts"][0]["files"][file] = sha256_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def changed_graph(folder):
    """Return the graph's file with one weight changed, and the proof bound to it."""
    graph = onnx.load(folder / "1" / "onnxruntime-fp32.onnx")
    head = next(tensor for tensor in graph.graph.initializer if tensor.name == "head.weight")
    values = onnx.numpy_helper.to_array(head).copy()
    values[0, 0] += 1
    head.CopyFrom(onnx.numpy_helper.from_array(values, head.name))
    content = graph.SerializeToString()
    proof = Proof.from_bytes((folder / "1" / "onnxruntime-fp32.proof.npz").read_bytes())
    bound = dataclasses.replace(proof, artifact_sha256=sha256_bytes(content))
    return content, bound.to_bytes()


def test_a_proof_of_another_artifact_is_refused(folder):
    content, _ = changed_graph(folder)
    replace_files(folder, {"onnxruntime-fp32.onnx": content})
    with pytest.raises(CorruptArtifact, match="is not the file its proof was made for"):
        opened(folder)


def test_an_artifact_that_computes_something_else_is_refused_with_figures(folder):
    """Every digest is right here: only the replay can tell."""
    content, proof = changed_graph(folder)
    replace_files(folder, {"onnxruntime-fp32.onnx": content, "onnxruntime-fp32.proof.npz": proof})
    with pytest.raises(BelowBar, match=r"does not reproduce .*max \|delta\| [\d.]+"):
        opened(folder)


def test_a_proof_that_is_no_proof_is_refused(folder):
    replace_files(folder, {"onnxruntime-fp32.proof.npz": b"not a proof"})
    with pytest.raises(CorruptArtifact, match=r"proof.npz: not a readable proof"):
        opened(folder)


def test_a_graph_that_is_no_graph_is_refused(folder):
    replace_files(folder, {"onnxruntime-fp32.onnx": b"not a graph"})
    with pytest.raises(CorruptArtifact, match="not a whole ONNX model"):
        opened(folder)


def test_a_proof_that_went_missing_since_is_refused_by_the_selftest(folder):
    model = Model(folder)
    with opened(folder) as runner:
        model.proof_path(model.artifacts[0]).unlink()
        with pytest.raises(CorruptArtifact, match=r"proof.npz: cannot be read"):
            selftest(model, model.artifacts[0], runner)


def test_a_refused_runner_is_closed(folder, monkeypatch):
    content, proof = changed_graph(folder)
    replace_files(folder, {"onnxruntime-fp32.onnx": content, "onnxruntime-fp32.proof.npz": proof})
    closed = []

    def load(*args):
        runner = load_unchecked(*args)
        leave = type(runner).__exit__

        class Watched(type(runner)):
            def __exit__(self, *reason):
                closed.append(True)
                leave(self, *reason)

        runner.__class__ = Watched
        return runner

    monkeypatch.setattr(open_module, "load_unchecked", load)
    with pytest.raises(BelowBar):
        opened(folder)
    assert closed == [True]


def test_a_runner_that_passed_is_left_open(folder):
    runner = opened(folder)
    assert runner.run(np.zeros((1, 3, 64, 64), np.float32))
    runner.__exit__(None, None, None)


def test_eager_without_weights_is_told_with_the_command(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(RepositoryError) as caught:
        opened(folder, EAGER)
    command = f"coat-deploy export mine --models {folder.parent} --weights SOURCE"
    assert str(caught.value).endswith(command)


def test_eager_with_damaged_weights_names_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=f"{path}: damaged"):
        opened(folder, EAGER)


def test_a_target_that_was_not_exported_is_told_with_the_command(folder):
    with pytest.raises(RepositoryError, match="Run: coat-deploy export mine --target openvino"):
        opened(folder, ArtifactQuery("openvino"))


def test_an_unknown_target_is_told_with_the_nearest(folder):
    with pytest.raises(UsageError, match="Did you mean 'openvino'"):
        opened(folder, ArtifactQuery("openvin"))


@pytest.mark.parametrize("query", [EAGER, ORT], ids=lambda query: query.target)
def test_a_precision_the_target_does_not_compute_in_is_told(folder, query):
    """Not even by eager, which would compute in another and say nothing."""
    with pytest.raises(UsageError, match=f"unknown precision for {query.target} 'bf61'"):
        opened(folder, dataclasses.replace(query, precision="bf61"))


def test_a_source_tells_what_it_is(folder):
    source = find_source(Model(folder), ORT)
    assert (source.precision, source.form, source.size) == ("fp32", "authored", (64, 64))
    assert source.sha256 == sha256_bytes(source.path.read_bytes())


def test_an_eager_source_is_the_folder_and_its_weights(folder):
    source = find_source(Model(folder), EAGER)
    assert (source.path, source.form) == (folder, "network")
    assert source.sha256 == sha256_bytes((folder / "model.safetensors").read_bytes())


# What a runtime compiled is kept, and never trusted.


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A model for OpenVINO, and the folder for what is compiled of it."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("COAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text(json.dumps(SPEC.to_json()))
    options = ExportOptions(target="openvino", weights="random:0", threads=1)
    exported = export(Repository.open(tmp_path / "models"), "mine", options)
    return exported.model.folder, compiled_folder("openvino", exported.artifact.files)


OPENVINO = ArtifactQuery("openvino")


def test_an_export_keeps_nothing_compiled(compiled):
    _, kept = compiled
    assert not kept.exists()


def test_what_was_compiled_is_kept_for_the_next_opening(compiled, monkeypatch):
    folder, kept = compiled
    opened(folder, OPENVINO).close()
    assert len(list(kept.iterdir())) == 1
    # Calling it would fail.
    monkeypatch.setattr("coat_deploy.backends.openvino_compile._read", None)
    with opened(folder, OPENVINO) as runner:
        assert runner.run(np.zeros((2, 3, 64, 64), np.float32))["logits"].shape == (2, 10)


def test_a_loader_compiles_anew(compiled):
    folder, kept = compiled
    find_source(Model(folder), OPENVINO).loader(ONE_THREAD)().close()
    assert not kept.exists()


def test_something_else_that_was_kept_is_forgotten(compiled, tmp_path):
    """Only the proof can tell: the file is whole, of this runtime, and of this CPU."""
    folder, kept = compiled
    graph = onnx.load(folder / "1" / "openvino-fp32.onnx")
    head = next(tensor for tensor in graph.graph.initializer if tensor.name == "head.weight")
    values = onnx.numpy_helper.to_array(head) + 1
    head.CopyFrom(onnx.numpy_helper.from_array(values[:, ::-1].copy(), head.name))
    onnx.save(graph, tmp_path / "other.onnx")
    options = dataclasses.replace(ONE_THREAD, cache=kept)
    backend("openvino").load(tmp_path / "other.onnx", options).close()
    (wrong,) = kept.iterdir()
    before = wrong.read_bytes()
    opened(folder, OPENVINO).close()
    assert [path.name for path in kept.iterdir()] == [wrong.name]
    assert wrong.read_bytes() != before
    opened(folder, OPENVINO).close()
