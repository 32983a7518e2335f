import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from coat_deploy.artifact import Artifact
from coat_deploy.cli.models import models
from coat_deploy.digest import sha256_bytes
from coat_deploy.network.variants import get_variant
from coat_deploy.repository import Model
from coat_deploy.spec import ModelSpec, Preprocess, WeightsRecord

app = typer.Typer()
app.add_typer(models, name="models")


@app.callback()
def several_commands() -> None:
    """Without this, typer leaves the name of an only command out."""


SPEC = ModelSpec("coat_tiny", 1000, 152, Preprocess((224, 224)), label_set="imagenet-1k")
FILE, PROOF = "onnxruntime-fp32.onnx", "onnxruntime-fp32.proof.npz"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository: ./models of an empty folder."""
    monkeypatch.delenv("COAT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def put(folder: Path, spec: ModelSpec, record: WeightsRecord | None = None) -> Model:
    """Write a model; with a `record` also weights and an artifact."""
    model = Model(folder)
    with model.staging() as staging:
        staging.write_spec(spec)
        if record is None:
            return staging.commit(None, None)
        staging.write("model.safetensors", b"weights")
        for name in (FILE, PROOF):
            staging.write(f"1/{name}", name.encode())
        artifact = Artifact(
            name="onnxruntime-fp32",
            target="onnxruntime",
            precision="fp32",
            form="authored",
            opset=20,
            size=(224, 224),
            features=False,
            files={name: sha256_bytes(name.encode()) for name in (FILE, PROOF)},
            proof=PROOF,
            weights_sha256=staging.weights_sha256(),
            spec_digest=spec.digest(),
            created="2026-01-02T03:04:05+00:00",
            agreement={"images": 8, "max_abs_difference": 2e-6, "top1_agreement": 1.0},
        )
        return staging.commit(artifact, record)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["models", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def listed(*arguments: str) -> dict[str, dict[str, Any]]:
    found: Sequence[dict[str, Any]] = json.loads(invoke(*arguments, "--json"))["models"]
    return {entry["name"]: entry for entry in found}


def shown(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(invoke("show", name, "--json"))
    return document


def test_the_published_models_are_listed_with_their_figures() -> None:
    found = listed("list")
    assert len(found) == 8
    entry = found["coat_lite_medium_384"]
    assert (entry["params_m"], entry["gmacs"]) == (44.57, 28.73)
    assert (entry["top1"], entry["top5"]) == (84.890, 97.376)
    assert (entry["input_size"], entry["classes"]) == ([384, 384], 1000)
    assert (entry["weights"], entry["artifacts"], entry["error"]) == (False, [], None)


def test_models_alone_lists() -> None:
    assert invoke() == invoke("list")
    assert listed() == listed("list")


def test_options_before_the_command_count_too(tmp_path: Path) -> None:
    put(tmp_path / "others" / "mine", SPEC)
    others = str(tmp_path / "others")
    assert "mine" in json.loads(invoke("--models", others, "--json", "show", "mine"))["name"]
    assert "mine" in listed("--models", others, "list")
    assert "mine" in listed("list", "--models", others)
    assert "mine" not in listed("list")


def test_the_table_has_a_line_for_every_model(folder: Path) -> None:
    put(folder / "mine", SPEC, WeightsRecord("official"))
    lines = invoke("list").splitlines()
    assert len(lines) == 10
    [line] = [line.split() for line in lines if line.split()[0] == "mine"]
    assert line == [
        *("mine", "coat_tiny", "5.5", "4.35", "78.44", "94.04", "224x224", "1000"),
        *("yes", "onnxruntime-fp32"),
    ]


@pytest.mark.parametrize(
    ("record", "holds"),
    [
        (WeightsRecord("timm"), True),
        (WeightsRecord("official"), True),
        (WeightsRecord("copy.pth", None, "c6efc33c" + 56 * "0"), True),
        (WeightsRecord("tuned.pth", None, 64 * "0"), False),
        (WeightsRecord("random:0"), False),
    ],
)
def test_published_accuracy_is_only_that_of_published_weights(
    folder: Path, record: WeightsRecord, holds: bool
) -> None:
    put(folder / "mine", SPEC, record)
    assert listed()["mine"]["top1"] == (78.442 if holds else None)


def test_a_fine_tuned_classifier_changes_parameters_and_has_no_published_accuracy(
    folder: Path,
) -> None:
    put(folder / "mine", replace(SPEC, num_classes=2, label_set=None))
    entry = listed()["mine"]
    # 998 classes less, each with 152 weights and a bias.
    assert entry["params_m"] == pytest.approx(5.50 - 998 * 153 / 1e6, abs=0.005)
    assert (entry["gmacs"], entry["top1"]) == (4.35, None)


def test_a_model_of_a_variant_of_ours_has_its_size_and_no_accuracy(folder: Path) -> None:
    variant = get_variant("coat_lite_nano")
    spec = ModelSpec(variant.name, 10, 160, Preprocess((64, 64)), timm=variant.timm)
    put(folder / "mine", spec, WeightsRecord("training"))
    entry = listed()["mine"]
    assert entry["architecture"] == "coat_lite_nano"
    assert (entry["params_m"], entry["gmacs"], entry["top1"]) == (0.95, 0.022, None)


def test_figures_of_another_size_do_not_hold(folder: Path) -> None:
    put(folder / "mine", replace(SPEC, preprocess=Preprocess((320, 224))))
    entry = listed()["mine"]
    assert (entry["params_m"], entry["gmacs"], entry["top1"]) == (5.5, None, None)


def test_an_altered_network_has_no_published_figures(folder: Path) -> None:
    put(folder / "mine", replace(SPEC, model_args={"crpe": False}))
    entry = listed()["mine"]
    assert (entry["params_m"], entry["gmacs"], entry["top1"]) == (None, None, None)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("config.json", "{", "is not JSON"),
        ("config.json", json.dumps(replace(SPEC, architecture="x").to_json()), "unknown arch"),
        ("manifest.json", "[]", "not a manifest"),
    ],
)
def test_a_broken_model_is_listed_with_the_error_among_the_others(
    folder: Path, file: str, text: str, reason: str
) -> None:
    put(folder / "mine", SPEC)
    (folder / "mine" / file).write_text(text)
    found = listed()
    assert len(found) == 9
    assert reason in found["mine"]["error"]
    assert found["coat_tiny"]["error"] is None
    assert reason in invoke("list")


def test_a_broken_model_cannot_be_shown(folder: Path) -> None:
    put(folder / "mine", SPEC)
    (folder / "mine" / "config.json").write_text("{")
    result = CliRunner().invoke(app, ["models", "show", "mine"])
    assert result.exit_code == 1
    assert "is not JSON" in result.stderr


def test_an_unknown_model_is_an_error_of_usage() -> None:
    result = CliRunner().invoke(app, ["models", "show", "coat_tini"])
    assert result.exit_code == 2
    assert "Did you mean 'coat_tiny'?" in result.stderr


def test_everything_about_a_model_is_shown(folder: Path) -> None:
    model = put(folder / "mine", SPEC, WeightsRecord("timm", "http://example.org/x", 64 * "a"))
    found = shown("mine")
    assert found["folder"] == str(model.folder.resolve())
    assert found["preprocess"]["crop_pct"] == 0.9
    assert found["labels"]["first"][0] == "tench"
    assert (found["labels"]["count"], found["labels"]["from"]) == (1000, "imagenet-1k")
    assert found["published"]["paper_top1"] == 78.3
    assert found["weights"]["record"]["source"] == "timm"
    assert found["weights"]["sha256"] == sha256_bytes(b"weights")
    [artifact] = found["artifacts"]
    assert (artifact["name"], artifact["opset"]) == ("onnxruntime-fp32", 20)
    assert artifact["bytes"] == len(FILE)
    assert artifact["sha256"] == sha256_bytes(FILE.encode())
    assert artifact["agreement"]["top1_agreement"] == 1.0
    assert (artifact["state"], artifact["reason"]) == ("ok", None)


def test_the_tables_of_a_model_tell_its_state_and_where_it_is(folder: Path) -> None:
    put(folder / "mine", SPEC, WeightsRecord("random:0"))
    text = invoke("show", "mine")
    assert str(folder.resolve() / "mine") in text
    assert "tench, goldfish" in text
    assert "top-1 78.3, top-5 94.0 %" in text
    assert "not this model's accuracy" in text
    assert "random:0" in text
    [line] = [line for line in text.splitlines() if line.strip().startswith("onnxruntime-fp32")]
    assert " ok " in line and "2e-06" in line and "2026-01-02" in line


def test_a_model_folder_is_shown_by_its_path(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "mine", SPEC)
    assert shown("elsewhere/mine")["name"] == "mine"


def test_a_model_without_labels_or_figures_is_shown(folder: Path) -> None:
    put(folder / "toy", ModelSpec("coat_toy", 3, 24, Preprocess((64, 64))))
    assert shown("toy")["published"] is None
    text = invoke("show", "toy")
    assert "class 0, class 1, class 2\n" in text
    assert "No artifacts" in text


def test_new_weights_make_an_artifact_stale(folder: Path) -> None:
    model = put(folder / "mine", SPEC, WeightsRecord("timm"))
    model.weights_path.write_bytes(b"others")
    [artifact] = shown("mine")["artifacts"]
    assert artifact["state"] == "stale"
    assert "another model.safetensors" in artifact["reason"]


def test_a_new_config_makes_an_artifact_stale(folder: Path) -> None:
    put(folder / "mine", SPEC, WeightsRecord("timm"))
    put(folder / "mine", replace(SPEC, preprocess=Preprocess((64, 64))))
    assert shown("mine")["artifacts"][0]["state"] == "stale"


def test_other_bytes_make_an_artifact_corrupt(folder: Path) -> None:
    model = put(folder / "mine", SPEC, WeightsRecord("timm"))
    model.path(model.artifacts[0]).write_bytes(b"damaged")
    [artifact] = shown("mine")["artifacts"]
    assert artifact["state"] == "corrupt"
    assert "onnxruntime-fp32 is corrupt: " in invoke("show", "mine")


@pytest.mark.parametrize("name", [FILE, PROOF])
def test_an_artifact_without_one_of_its_files_is_missing(folder: Path, name: str) -> None:
    put(folder / "mine", SPEC, WeightsRecord("timm"))
    (folder / "mine" / "1" / name).unlink()
    assert shown("mine")["artifacts"][0]["state"] == "missing"


def test_models_are_listed_and_shown_with_only_the_core_installed(folder: Path) -> None:
    put(folder / "mine", SPEC, WeightsRecord("timm"))
    script = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'openvino', 'safetensors', 'timm'):\n"
        "    sys.modules[name] = None\n"
        "from coat_deploy.cli.models import models\n"
        "models(sys.argv[1:])\n"
    )
    for arguments in (["list"], ["show", "mine"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "mine" in done.stdout
