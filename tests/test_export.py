import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from coat_deploy import candidate  # noqa: E402
from coat_deploy import export as export_module  # noqa: E402
from coat_deploy import model as model_module  # noqa: E402
from coat_deploy.backends.select import backend  # noqa: E402
from coat_deploy.candidate import MakeBatches, synthetic_batches  # noqa: E402
from coat_deploy.errors import (  # noqa: E402
    BelowBar,
    CoatDeployError,
    GraphError,
    RepositoryError,
    RunnerError,
    StaleArtifact,
    UsageError,
    WeightsError,
)
from coat_deploy.export import Exported, ExportOptions, export  # noqa: E402
from coat_deploy.graph.metadata import read_metadata  # noqa: E402
from coat_deploy.measure.bar import get_bar  # noqa: E402
from coat_deploy.model import ArtifactQuery, Model  # noqa: E402
from coat_deploy.network.weights import WeightsOptions  # noqa: E402
from coat_deploy.open import find_source, open_source  # noqa: E402
from coat_deploy.repository import Repository  # noqa: E402
from coat_deploy.runner import LoadOptions  # noqa: E402
from coat_deploy.spec import ModelSpec, Preprocess, WeightsRecord  # noqa: E402

FEATURES = {"coat_lite_toy": 40, "coat_toy": 24}
ONE_THREAD = LoadOptions(threads=1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Toys are too small for threads: on busy cores they only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def put_config(folder, architecture="coat_lite_toy", **fields):
    """Write the config of a toy with ten classes, which nobody's published list holds."""
    spec = ModelSpec(architecture, 10, FEATURES[architecture], Preprocess((64, 64)), **fields)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(spec.to_json()))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A repository of both toys, without weights."""
    monkeypatch.delenv("COAT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in FEATURES:
        put_config(tmp_path / "given" / name, name)
    return tmp_path / "given"


def run(
    models: Path, name: str = "coat_lite_toy", batches: MakeBatches | None = None, **fields
) -> Exported:
    options = ExportOptions(threads=1, **{"weights": "random:0", **fields})
    return export(Repository.open(models), name, options, batches)


def tree(folder):
    """Every file of a folder with its content, the hidden ones too."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def opens(models, name="coat_lite_toy", **query):
    """Open an artifact as for work, with every check and its proof replayed."""
    source = find_source(Model(models / name), ArtifactQuery("onnxruntime", **query))
    open_source(source, ONE_THREAD).__exit__(None, None, None)
    return True


# What is made.


@pytest.mark.parametrize("name", sorted(FEATURES))
@pytest.mark.parametrize(
    ("fields", "artifact"),
    [
        ({}, "onnxruntime-fp32"),
        ({"dynamic": True}, "onnxruntime-fp32-dynamic"),
        ({"features": True}, "onnxruntime-fp32-features"),
        ({"size": (64, 96)}, "onnxruntime-fp32-64x96"),
        ({"size": (70, 50)}, "onnxruntime-fp32-70x50"),
        ({"dynamic": True, "features": True}, "onnxruntime-fp32-dynamic-features"),
        ({"opset": 18}, "onnxruntime-fp32"),
        ({"opset": 23}, "onnxruntime-fp32"),
    ],
)
def test_an_artifact_is_made_and_proven(models, name, fields, artifact):
    exported = run(models, name, **fields)
    assert exported.artifact.name == artifact
    assert exported.validation is not None and exported.validation.passed
    assert exported.model.artifacts == (exported.artifact,)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_gets_an_artifact_of_its_own(models, precision, dynamic):
    pytest.importorskip("openvino")
    try:
        exported = run(models, target="openvino", precision=precision, dynamic=dynamic)
    except RunnerError as error:
        if "does not compute in bf16" not in str(error):
            raise
        pytest.skip(str(error))
    assert exported.artifact.name == f"openvino-{precision}{'-dynamic' * dynamic}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FEATURES))
@pytest.mark.usefixtures("traced_once")
def test_a_traced_artifact_is_made_and_proven(models, name):
    exported = run(models, name, form="traced")
    assert (exported.artifact.name, exported.artifact.form) == ("onnxruntime-fp32-traced", "traced")
    assert exported.validation is not None and exported.validation.passed


def test_an_exported_artifact_opens_with_every_check(exported):
    assert opens(exported)


def test_artifacts_of_other_kinds_gather_in_one_model(exported):
    run(exported, weights=None, features=True)
    model = run(exported, weights=None, dynamic=True).model
    names = ["onnxruntime-fp32", "onnxruntime-fp32-features", "onnxruntime-fp32-dynamic"]
    assert [artifact.name for artifact in model.artifacts] == names


def test_the_opset_is_the_one_asked_for(models):
    graph = onnx.load(run(models, opset=19).path)
    assert graph.opset_import[0].version == 19


def test_a_dynamic_artifact_agrees_with_eager_at_a_size_it_was_not_made_for(models):
    exported = run(models, dynamic=True)
    pixels = np.random.Generator(np.random.PCG64(0)).normal(0, 1, (2, 3, 50, 83))
    logits = []
    for target in ("eager", "onnxruntime"):
        source = find_source(exported.model, ArtifactQuery(target))
        with open_source(source, ONE_THREAD) as runner:
            logits.append(runner.run(pixels.astype(np.float32))["logits"])
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


def test_a_dynamic_artifact_is_validated_at_two_sizes(models):
    validation = run(models, dynamic=True).validation
    assert validation is not None
    assert sorted(validation.by_size) == [(48, 64), (64, 64)]


def test_a_graph_that_only_seems_dynamic_is_not_let_in(models, monkeypatch):
    author = candidate.author_graph

    def fixed(spec, weights, form, options):
        return author(spec, weights, form, candidate.GraphOptions((64, 64), False, options.opset))

    monkeypatch.setattr(candidate, "author_graph", fixed)
    with pytest.raises(CoatDeployError):
        run(models, dynamic=True)
    assert set(tree(models / "coat_lite_toy")) == {"config.json"}


def test_features_are_the_outputs_of_a_features_artifact(models):
    graph = onnx.load(run(models, features=True).path).graph
    assert [output.name for output in graph.output] == ["x1", "x2", "x3", "x4"]


def test_the_file_tells_what_it_is(models):
    exported = run(models, labels=[f"label {i}" for i in range(10)])
    metadata = read_metadata(onnx.load(exported.path))
    assert metadata["model"] == "coat_lite_toy"
    assert metadata["weights_sha256"] == exported.artifact.weights_sha256
    assert json.loads(metadata["labels"])[3] == "label 3"
    assert ModelSpec.from_json(json.loads(metadata["config"])) == exported.model.spec


def test_the_manifest_tells_what_it_was_made_with(models):
    tools = run(models).artifact.tools
    assert tools["torch"] == torch.__version__
    assert tools["onnxruntime"] == backend("onnxruntime").version()
    assert {"coat-deploy", "onnx"} <= set(tools)


def test_the_same_inputs_give_the_same_bytes(models, tmp_path):
    put_config(tmp_path / "again" / "coat_lite_toy")
    first, second = run(models), run(tmp_path / "again")
    assert first.artifact.files == second.artifact.files


def test_json_of_an_export_has_its_stable_keys(models):
    exported = run(models)
    document = json.loads(json.dumps(exported.to_json()))
    path = Path(document["artifact"])
    assert path.is_absolute() and path.is_file()
    assert document["model"] == "coat_lite_toy"
    assert (document["target"], document["precision"]) == ("onnxruntime", "fp32")
    assert document["sha256"] == exported.artifact.sha256
    assert document["agreement"]["max_abs_difference"] < 1e-4
    assert document["agreement"]["top1_agreement"] == 1.0


def test_the_artifacts_path_is_absolute_for_relative_models(models):
    document = run(Path("given")).to_json()
    assert document["artifact"] == str(models / "coat_lite_toy" / "1" / "onnxruntime-fp32.onnx")


def test_without_validation_there_is_no_agreement_but_a_proof(models):
    exported = run(models, validate=False)
    assert (exported.validation, exported.to_json()["agreement"]) == (None, {})
    assert opens(models)


def test_images_given_take_the_place_of_synthetic_ones(models):
    exported = run(models, batches=lambda how: list(synthetic_batches(how))[:1])
    assert exported.artifact.agreement["source"] == "images"
    assert exported.artifact.agreement["images"] == 1


def test_every_step_is_told(models):
    steps: list[str] = []
    export(
        Repository.open(models),
        "coat_lite_toy",
        ExportOptions(weights="random:0", threads=1),
        progress=steps.append,
    )
    assert steps == ["reading weights", "writing the graph", "proving it against eager"] + [
        "validating"
    ]


# Where it is written.


def test_a_path_with_a_slash_is_exported_in_its_place(models, tmp_path):
    put_config(tmp_path / "else where" / "mödel")
    exported = run(models, "./else where/mödel")
    assert exported.path.resolve() == tmp_path / "else where/mödel/1/onnxruntime-fp32.onnx"


def test_a_model_found_behind_is_written_to_the_first_root(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("COAT_MODELS", str(exported))
    before = tree(exported)
    model = run(tmp_path / "new", weights=None).model
    assert model.folder == tmp_path / "new" / "coat_lite_toy"
    assert model.weights_record == WeightsRecord("random:0")
    assert model.spec == Model(exported / "coat_lite_toy").spec
    assert tree(exported) == before


def test_a_new_name_leaves_the_model_it_is_made_from(models):
    before = tree(models / "coat_lite_toy")
    model = run(models, rename="mine").model
    assert model.name == "mine" and opens(models, "mine")
    assert tree(models / "coat_lite_toy") == before


def test_a_linked_folder_is_exported_to(models, tmp_path):
    put_config(tmp_path / "elsewhere")
    (models / "link").symlink_to(tmp_path / "elsewhere")
    assert run(models, "link").model.name == "link"
    assert (models / "link").is_symlink() and (tmp_path / "elsewhere" / "manifest.json").exists()


# Weights and classes.


def test_weights_are_kept_for_the_next_export(exported):
    model = run(exported, weights=None, features=True).model
    first, second = model.artifacts
    assert first.weights_sha256 == second.weights_sha256
    assert model.weights_record == WeightsRecord("random:0")


def test_a_config_may_say_where_weights_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_config(tmp_path / "given" / "mine", weights=WeightsRecord("random:3"))
    exported = run(tmp_path / "given", "mine", weights=None)
    assert exported.model.weights_record == WeightsRecord("random:3")


def test_without_weights_it_says_how_to_give_them(models):
    with pytest.raises(UsageError, match=r"no weights \(expected model.safetensors.*--weights"):
        run(models, weights=None)


def test_weights_given_anew_make_other_artifacts_stale(exported):
    model = run(exported, weights="random:1", features=True).model
    with pytest.raises(StaleArtifact, match="fp32 was exported from another model.safetensors"):
        model.check_parents(model.artifacts[0])
    assert opens(exported, features=True)


def test_weights_of_another_architecture_name_the_file(models, template):
    shutil.copy(template / "coat_lite_toy" / "model.safetensors", models / "coat_toy")
    with pytest.raises(WeightsError, match=r"coat_toy/model.safetensors: does not fit coat_toy"):
        run(models, "coat_toy", weights=None)


def test_damaged_weights_name_the_file(exported):
    path = exported / "coat_lite_toy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"model.safetensors: damaged"):
        run(exported, weights=None)


def test_another_number_of_classes_is_written_to_the_config(models):
    exported = run(models, num_classes=7)
    assert exported.model.spec.num_classes == 7
    assert onnx.load(exported.path).graph.output[0].type.tensor_type.shape.dim[1].dim_value == 7


def test_labels_alone_say_how_many_classes(models):
    spec = run(models, labels=["cat", "dog", "cow"]).model.spec
    assert (spec.num_classes, spec.label_names) == (3, ("cat", "dog", "cow"))


def test_labels_of_another_number_than_classes_are_refused(models):
    with pytest.raises(UsageError, match="labels: 2 names for 3 classes"):
        run(models, labels=["cat", "dog"], num_classes=3)


def test_weights_of_other_classes_are_refused_with_the_way_on(exported):
    with pytest.raises(WeightsError, match="add --replace-head"):
        run(exported, weights=None, num_classes=7)


@pytest.mark.parametrize("weights", ["the folder's", "a file's"])
def test_a_head_can_be_replaced(exported, weights):
    origin = exported / "coat_lite_toy" / "model.safetensors"
    model = run(
        exported,
        weights=None if weights == "the folder's" else str(origin),
        rename=None if weights == "the folder's" else "mine",
        num_classes=7,
        loading=WeightsOptions(replace_head=True),
    ).model
    assert model.spec.num_classes == 7 and opens(exported, model.name)


# What cannot be is told before any work.


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target": "onnxruntim"}, UsageError, "Did you mean 'onnxruntime'"),
        ({"target": "eager"}, UsageError, "unknown target to export to 'eager'"),
        ({"form": "trace"}, UsageError, "Did you mean 'traced'"),
        ({"precision": "bf16"}, UsageError, "unknown precision for onnxruntime 'bf16'"),
        ({"opset": 17}, GraphError, "opset 17: not supported"),
        ({"size": (64, 31)}, GraphError, "size 64x31: too small"),
        ({"rename": "../x"}, UsageError, "model name '../x'"),
        ({"weights": "nowhere"}, UsageError, "unknown source"),
        ({"weights": "nowhere.pth"}, WeightsError, "nowhere.pth: no such file"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(models, fields, error, message):
    before = tree(models.parent)
    with pytest.raises(error, match=message):
        run(models, **fields)
    assert tree(models.parent) == before


def test_an_unknown_model_is_refused_with_the_nearest(models):
    with pytest.raises(UsageError, match="Did you mean 'coat_lite_toy'"):
        run(models, "coat_lite_toi")


def test_a_broken_manifest_is_told_before_any_work(models, monkeypatch):
    (models / "coat_lite_toy" / "manifest.json").write_text("{")
    monkeypatch.setattr(export_module, "load_checkpoint", None)  # would be the first work
    with pytest.raises(RepositoryError, match=r"manifest.json: is not JSON"):
        run(models)


# What fails half way leaves what was there.


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository with an artifact, exported once."""
    models = tmp_path_factory.mktemp("template") / "models"
    put_config(models / "coat_lite_toy")
    run(models)
    return models


@pytest.fixture
def exported(template, models):
    """A repository with an artifact; the next export would replace it, weights included."""
    shutil.rmtree(models)
    shutil.copytree(template, models)
    return models


def leaves_all(models, action):
    """Run `action`; nothing may have changed, and the old artifact must pass its proof."""
    before = tree(models)
    action()
    assert tree(models) == before
    assert opens(models)


def raising(error):
    def call(*_args, **_kwargs):
        raise error

    return call


STAGES = [
    (export_module, "load_checkpoint"),
    (candidate, "author_graph"),
    (candidate, "check_graph"),
    (candidate, "serialise"),
    (candidate, "make_proof"),
    (candidate, "replay"),
    (candidate, "validate"),
    (model_module, "move_in"),
]


@pytest.mark.parametrize(("module", "stage"), STAGES, ids=[stage for _, stage in STAGES])
def test_ctrl_c_at_any_stage_leaves_what_was_there(exported, monkeypatch, module, stage):
    def action():
        monkeypatch.setattr(module, stage, raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(exported, weights="random:1")

    leaves_all(exported, action)


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6])
def test_a_full_disk_at_any_file_leaves_what_was_there(exported, monkeypatch, nth):
    """Weights, config, graph, proof, manifest, list of what to undo: each is synced once."""
    left, sync = nth, os.fsync

    def full(handle):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    def action():
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RepositoryError, match=r"cannot be written \(No space left"):
            run(exported, weights="random:1")
        monkeypatch.undo()

    leaves_all(exported, action)


def test_a_graph_that_computes_something_else_is_not_let_in(exported, monkeypatch):
    author = candidate.author_graph

    def wrong(spec, weights, form, options):
        return author(spec, {**weights, "norm4.bias": weights["norm4.bias"] + 1}, form, options)

    def action():
        monkeypatch.setattr(candidate, "author_graph", wrong)
        with pytest.raises(BelowBar, match=r"\(not exported\): does not reproduce.*max \|delta\|"):
            run(exported, weights=None)

    leaves_all(exported, action)


def test_an_artifact_below_the_bar_on_images_is_not_let_in(exported, monkeypatch):
    def action():
        monkeypatch.setattr(candidate, "replay", lambda *_: None)
        bar = get_bar("fp32").override(max_abs_difference=1e-12)
        with pytest.raises(BelowBar, match="not exported, it does not agree with eager"):
            run(exported, weights=None, bar=bar)

    leaves_all(exported, action)


def test_a_first_export_that_fails_leaves_no_folder(models, tmp_path, monkeypatch):
    monkeypatch.setattr(candidate, "replay", raising(BelowBar("no")))
    monkeypatch.setenv("COAT_MODELS", str(models))
    with pytest.raises(BelowBar):
        run(tmp_path / "new" / "place")
    assert not (tmp_path / "new").exists()


EXPORT = """
import os, resource, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from coat_deploy import candidate
from coat_deploy.errors import CoatDeployError
from coat_deploy.export import ExportOptions, export
from coat_deploy.repository import Repository
def go(**fields):
    options = ExportOptions(threads=1, **fields)
    return export(Repository.open(Path(sys.argv[1])), "coat_lite_toy", options)
"""


def start(models, program):
    command = [sys.executable, "-c", EXPORT + program, str(models)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_file_that_cannot_grow_leaves_what_was_there(exported):
    program = (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: go(weights='random:1')\n"
        "except CoatDeployError as error: print(error)\n"
    )

    def action():
        printed, errors = start(exported, program).communicate(timeout=120)
        assert "cannot be written (File too large); what was there is unchanged" in printed, errors

    leaves_all(exported, action)


def test_a_killed_export_leaves_what_was_there_and_the_next_clears_up(exported):
    program = (
        "candidate.replay = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "go(weights='random:1')\n"
    )
    process = start(exported, program)
    before = tree(exported)
    assert process.wait(timeout=120) == -signal.SIGKILL
    process.communicate()
    left = {name for name in tree(exported) if name not in before}
    assert left and all("/.staging-" in name for name in left)
    assert {name: tree(exported)[name] for name in before} == before
    assert opens(exported)
    run(exported, weights=None)
    assert not [name for name in tree(exported) if "/.staging-" in name]


def test_two_exports_at_once_are_both_in_the_manifest(exported):
    both = [start(exported, f"go(features=True, dynamic={dynamic})\n") for dynamic in (False, True)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert opens(exported, features=True, size=(64, 64))
    assert opens(exported, features=True, size=(80, 64))
    assert len(Model(exported / "coat_lite_toy").artifacts) == 3
