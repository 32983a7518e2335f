import dataclasses
import errno
import json
import os
import shlex

import pytest

from coat_deploy.artifact import Artifact, artifact_name
from coat_deploy.digest import sha256_bytes
from coat_deploy.errors import CorruptArtifact, RepositoryError, SpecError, StaleArtifact
from coat_deploy.model import ArtifactQuery, Model
from coat_deploy.spec import ModelSpec, Preprocess, WeightsRecord

SPEC = ModelSpec("coat_lite_toy", 3, 40, Preprocess((64, 64)))
WEIGHTS, RECORD = b"weights", WeightsRecord("random:0")


def make(
    target="onnxruntime", precision="fp32", size=(64, 64), form="authored", features=False,
    content="graph",
):  # fmt: skip
    """Return an artifact, and the content of its two files."""
    name = artifact_name(target, precision, size, (64, 64), form, features)
    files = {f"{name}.onnx": f"{content} {name}".encode(), f"{name}.proof.npz": b"proof"}
    artifact = Artifact(
        name=name,
        target=target,
        precision=precision,
        form=form,
        opset=20,
        size=size,
        features=features,
        files={file: sha256_bytes(data) for file, data in files.items()},
        proof=f"{name}.proof.npz",
        weights_sha256=sha256_bytes(WEIGHTS),
        spec_digest=SPEC.digest(),
        created="2026-01-02T03:04:05+00:00",
    )
    return artifact, files


def put(folder, *makings, weights=WEIGHTS, record=RECORD, spec=SPEC):
    """Commit artifacts one after another, as exports do."""
    model = Model(folder)
    for artifact, files in makings or [(None, {})]:
        with model.staging() as staging:
            staging.write_spec(spec)
            staging.write("model.safetensors", weights)
            for file, data in files.items():
                staging.write(f"1/{file}", data)
            model = staging.commit(artifact, record)
    return model


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "mine"


def test_a_committed_model_is_read_back(folder):
    artifact, files = make()
    model = put(folder, (artifact, files))
    assert (model.spec, model.artifacts, model.weights_record) == (SPEC, (artifact,), RECORD)
    assert {path.name: path.read_bytes() for path in (folder / "1").iterdir()} == files


def test_the_name_is_the_folders(folder):
    assert Model(folder).name == "mine"


def test_artifacts_keep_the_order_of_export(folder):
    model = put(folder, make(), make("openvino"), make(features=True))
    names = ["onnxruntime-fp32", "openvino-fp32", "onnxruntime-fp32-features"]
    assert [artifact.name for artifact in model.artifacts] == names


def test_an_artifact_replaces_one_of_the_same_name(folder):
    model = put(folder, make(), make("openvino"), make(content="better"))
    assert [artifact.name for artifact in model.artifacts] == ["openvino-fp32", "onnxruntime-fp32"]
    assert model.path(model.artifacts[1]).read_bytes() == b"better onnxruntime-fp32"


def test_a_replaced_artifact_takes_its_reports_and_odd_files_along(folder):
    put(folder, make(), make("openvino"))
    for name in ("onnxruntime-fp32.validation.json", "onnxruntime-fp32.onnx.data"):
        (folder / "1" / name).write_text("of the old one")
    (folder / "1" / "openvino-fp32.validation.json").write_text("of another")
    put(folder, make(content="better"))
    assert sorted(path.name for path in (folder / "1").iterdir()) == [
        "onnxruntime-fp32.onnx",
        "onnxruntime-fp32.proof.npz",
        "openvino-fp32.onnx",
        "openvino-fp32.proof.npz",
        "openvino-fp32.validation.json",
    ]


def test_an_artifact_exported_again_unchanged_keeps_its_report(folder):
    model = put(folder, make())
    report = model.write_report(model.artifacts[0], "validation.json", "{}")
    put(folder, make())
    assert report.exists()


def test_a_config_that_says_the_same_is_not_rewritten(folder):
    folder.mkdir()
    by_hand = json.dumps(SPEC.to_json() | {"comment": "mine"})
    (folder / "config.json").write_text(by_hand)
    put(folder, make())
    assert (folder / "config.json").read_text() == by_hand


def test_a_config_that_says_something_else_is_rewritten(folder):
    put(folder, make())
    spec = SPEC.with_classes(5)
    assert put(folder, make(), spec=spec).spec == spec


def test_a_file_that_was_withdrawn_is_not_moved_in(folder):
    artifact, files = make()
    with Model(folder).staging() as staging:
        staging.write_spec(SPEC)
        for file, data in {**files, "other.onnx": b"other"}.items():
            staging.write(f"1/{file}", data)
        staging.withdraw("1/other.onnx")
        model = staging.commit(artifact, RECORD)
    assert {path.name for path in (folder / "1").iterdir()} == set(files)
    assert model.artifacts == (artifact,)


def test_weights_none_keeps_the_record_there_is(folder):
    put(folder, make())
    with Model(folder).staging() as staging:
        model = staging.commit(None, None)
    assert model.weights_record == RECORD


def test_linked_weights_are_those_of_the_moment(folder):
    put(folder, make())
    with Model(folder).staging() as staging:
        staging.link_weights()
        put(folder, make(), weights=b"other weights")
        assert staging.weights_sha256() == sha256_bytes(WEIGHTS)
        model = staging.commit(None, None)
    assert model.weights_path.read_bytes() == b"other weights"


def test_weights_that_are_a_link_are_linked_too(folder, tmp_path):
    put(folder, make())
    os.replace(folder / "model.safetensors", tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with Model(folder).staging() as staging:
        staging.link_weights()
        assert staging.weights_sha256() == sha256_bytes(WEIGHTS)


def test_a_config_of_an_unknown_architecture_names_the_nearest(folder):
    document = SPEC.to_json() | {"architecture": "coat_lite_tini"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(document))
    message = r"mine/config.json: unknown architecture.*Did you mean 'coat_lite_tiny'\?"
    with pytest.raises(SpecError, match=message):
        _ = Model(folder).spec


def test_a_broken_config_is_named(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{")
    with pytest.raises(SpecError, match=r"mine/config.json: is not JSON"):
        _ = Model(folder).spec


def test_a_folder_without_config_is_named(folder):
    with pytest.raises(SpecError, match=r"mine/config.json: cannot be read"):
        _ = Model(folder).spec


def test_a_folder_without_manifest_has_no_artifacts(folder):
    assert (Model(folder).artifacts, Model(folder).weights_record) == ((), None)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"artifacts": {}}', '{"artifacts": [{}]}'])
def test_a_broken_manifest_is_named_with_what_to_do(folder, text):
    put(folder, make())
    (folder / "manifest.json").write_text(text)
    with pytest.raises(RepositoryError, match=r"mine/manifest.json.*(emove|ewrite)"):
        _ = Model(folder).artifacts


@pytest.mark.parametrize("record", [[], "timm", {"url": "file:///x"}, {"source": "x", "url": 3}])
def test_a_broken_record_of_weights_is_named(folder, record):
    put(folder, make())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"weights": record}))
    with pytest.raises(RepositoryError, match="manifest.json: '"):
        _ = Model(folder).weights_record


def test_a_commit_onto_a_broken_manifest_changes_nothing(folder):
    put(folder, make())
    (folder / "manifest.json").write_text("{")
    with pytest.raises(RepositoryError, match="is not JSON"):
        put(folder, make(content="better"))
    assert (folder / "1" / "onnxruntime-fp32.onnx").read_bytes() == b"graph onnxruntime-fp32"


def found(folder, *makings, **query):
    return put(folder, *makings).find(ArtifactQuery("onnxruntime", **query)).name


def test_the_models_own_size_is_preferred(folder):
    makings = make(size=(96, 96)), make(size=None), make()
    assert found(folder, *makings) == "onnxruntime-fp32"


def test_a_dynamic_artifact_is_preferred_to_one_of_another_size(folder):
    assert found(folder, make(size=(96, 96)), make(size=None)) == "onnxruntime-fp32-dynamic"


def test_the_size_asked_for_is_preferred_to_dynamic(folder):
    makings = make(size=None), make(size=(96, 96)), make()
    assert found(folder, *makings, size=(96, 96)) == "onnxruntime-fp32-96x96"


def test_a_dynamic_artifact_serves_any_size(folder):
    assert found(folder, make(), make(size=None), size=(80, 72)) == "onnxruntime-fp32-dynamic"


def test_fp32_is_preferred_whatever_was_exported_first(folder):
    assert found(folder, make(precision="bf16"), make()) == "onnxruntime-fp32"


def test_the_precision_asked_for_is_taken(folder):
    makings = make(), make(precision="bf16")
    assert found(folder, *makings, precision="bf16") == "onnxruntime-bf16"


def test_an_authored_graph_is_preferred_to_a_traced_one(folder):
    assert found(folder, make(form="traced"), make()) == "onnxruntime-fp32"


def test_a_traced_graph_is_taken_when_asked_for(folder):
    assert found(folder, make(), make(form="traced"), form="traced") == "onnxruntime-fp32-traced"


def test_features_and_logits_do_not_stand_for_each_other(folder):
    assert found(folder, make(features=True), make()) == "onnxruntime-fp32"
    with pytest.raises(RepositoryError):
        put(folder / "other", make()).find(ArtifactQuery("onnxruntime", features=True))


@pytest.mark.parametrize(
    ("query", "flags"),
    [
        (ArtifactQuery("openvino"), "--target openvino"),
        (ArtifactQuery("openvino", "bf16"), "--target openvino --precision bf16"),
        (ArtifactQuery("openvino", size=(64, 64)), "--target openvino"),
        (ArtifactQuery("openvino", size=(64, 96)), "--target openvino --size 64x96"),
        (ArtifactQuery("openvino", form="authored"), "--target openvino"),
        (ArtifactQuery("openvino", form="traced"), "--target openvino --form traced"),
        (ArtifactQuery("openvino", features=True), "--target openvino --features"),
    ],
)
def test_what_is_missing_is_told_with_the_exact_command(folder, query, flags):
    with pytest.raises(RepositoryError) as caught:
        put(folder, make()).find(query)
    assert "(there: onnxruntime-fp32)" in str(caught.value)
    assert str(caught.value).endswith(
        f"Run: coat-deploy export mine {flags} --models {folder.parent}"
    )


def test_a_command_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    folder = tmp_path / "mödels of; mine" / "it's"
    command = put(folder, make()).export_command(ArtifactQuery("openvino"))
    words = shlex.split(command)
    assert (words[2], words[-1]) == ("it's", str(folder.parent))


def test_the_command_of_a_dynamic_artifact_says_so(folder):
    model = put(folder, make(size=None))
    assert "--precision fp32 --size dynamic --models" in model.export_command(model.artifacts[0])


def test_an_artifact_of_these_parents_and_bytes_is_sound(folder):
    model = put(folder, make())
    model.check_parents(model.artifacts[0])
    model.check_files(model.artifacts[0])


def test_other_weights_make_an_artifact_stale(folder):
    put(folder, make(), make("openvino"))
    model = put(folder, make(), weights=b"other weights")
    message = r"openvino-fp32 was exported from another model.safetensors .*Run: coat-deploy"
    with pytest.raises(StaleArtifact, match=message):
        model.check_parents(model.artifacts[0])


def test_an_artifact_without_its_weights_beside_it_is_not_stale(folder):
    model = put(folder, make())
    model.weights_path.unlink()
    model.check_parents(model.artifacts[0])
    assert not model.weights_path.exists()


def test_another_config_makes_an_artifact_stale(folder):
    put(folder, make(), make("openvino"))
    model = put(folder, make(), spec=dataclasses.replace(SPEC, label_names=("a", "b", "c")))
    with pytest.raises(StaleArtifact, match="from another config.json"):
        model.check_parents(model.artifacts[0])


def test_another_note_of_where_weights_are_leaves_artifacts_fresh(folder):
    put(folder, make(), make("openvino"))
    model = put(folder, make(), spec=dataclasses.replace(SPEC, weights=WeightsRecord("timm")))
    model.check_parents(model.artifacts[0])


@pytest.mark.parametrize("which", [0, 1], ids=["graph", "proof"])
def test_a_flipped_bit_is_found(folder, which):
    model = put(folder, make())
    path = folder / "1" / list(model.artifacts[0].files)[which]
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=f"{path.name}: the file is not the one"):
        model.check_files(model.artifacts[0])


@pytest.mark.parametrize("which", [0, 1], ids=["graph", "proof"])
def test_a_missing_file_is_found(folder, which):
    model = put(folder, make())
    path = folder / "1" / list(model.artifacts[0].files)[which]
    path.unlink()
    with pytest.raises(CorruptArtifact, match=f"{path.name}: the file is missing"):
        model.check_files(model.artifacts[0])


def test_a_report_is_written_beside_its_artifact(folder):
    model = put(folder, make())
    path = model.write_report(model.artifacts[0], "validation.json", "{}")
    assert path == folder / "1" / "onnxruntime-fp32.validation.json"
    assert path.read_text() == "{}"


def test_a_report_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    model = put(folder, make())
    path = model.write_report(model.artifacts[0], "validation.json", "old")

    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RepositoryError, match="No space left"):
        model.write_report(model.artifacts[0], "validation.json", "new")
    assert path.read_text() == "old"


def test_a_report_replaces_no_config(folder):
    model = put(folder, make())
    before = (folder / "config.json").read_bytes()
    model.write_report(model.artifacts[0], "txt", "text")
    assert (folder / "config.json").read_bytes() == before


def test_a_linked_folder_takes_a_commit(folder, tmp_path):
    put(folder, make())
    (tmp_path / "link").symlink_to(folder)
    put(tmp_path / "link", make("openvino"))
    assert (tmp_path / "link").is_symlink()
    assert len(Model(folder).artifacts) == 2
