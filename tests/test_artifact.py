import copy
import dataclasses
import json

import pytest

from coat_deploy.artifact import Artifact, artifact_name
from coat_deploy.errors import RepositoryError

DIGEST = "ab" * 32
ARTIFACT = Artifact(
    name="onnxruntime-fp32",
    target="onnxruntime",
    precision="fp32",
    form="authored",
    opset=20,
    size=(64, 96),
    features=False,
    files={"onnxruntime-fp32.onnx": DIGEST, "onnxruntime-fp32.proof.npz": "cd" * 32},
    proof="onnxruntime-fp32.proof.npz",
    weights_sha256=DIGEST,
    spec_digest=DIGEST,
    created="2026-01-02T03:04:05+00:00",
    tools={"onnx": "1.19"},
    agreement={"images": 8},
)


def entry(**changes):
    return copy.deepcopy(ARTIFACT.to_json()) | changes


def test_an_artifact_survives_its_entry():
    written = json.loads(json.dumps(ARTIFACT.to_json()))
    assert Artifact.from_json(written, "manifest.json") == ARTIFACT


def test_a_choice_survives_its_entry():
    chosen = dataclasses.replace(ARTIFACT, choice={"precision": "fp32", "considered": []})
    written = json.loads(json.dumps(chosen.to_json()))
    assert Artifact.from_json(written, "manifest.json") == chosen


def test_without_a_choice_an_entry_is_as_earlier_versions_wrote_it():
    assert "choice" not in ARTIFACT.to_json()
    assert Artifact.from_json(entry(), "manifest.json").choice == {}


def test_a_choice_that_is_none_is_refused():
    with pytest.raises(RepositoryError, match="'choice' is damaged"):
        Artifact.from_json(entry(choice=[1]), "manifest.json")


def test_a_dynamic_artifact_survives_its_entry():
    assert Artifact.from_json(entry(size=None), "manifest.json").size is None


def test_the_first_file_is_the_one_a_runtime_opens():
    assert (ARTIFACT.file, ARTIFACT.sha256) == ("onnxruntime-fp32.onnx", DIGEST)


def test_a_fixed_artifact_accepts_its_own_size_only():
    assert [ARTIFACT.accepts(size) for size in ((64, 96), (96, 64))] == [True, False]


def test_a_dynamic_artifact_accepts_every_size():
    assert Artifact.from_json(entry(size=None), "manifest.json").accepts((250, 190))


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "1/x.onnx",
        "..",
        ".hidden",
        "",
        "x\0.onnx",
        "x\n.onnx",
        "x" * 200,
    ],
)
def test_a_file_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(RepositoryError, match="'files' is damaged"):
        Artifact.from_json(entry(files={name: DIGEST, ARTIFACT.proof: DIGEST}), "manifest.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../../x"),
        ("name", None),
        ("target", None),
        ("precision", 32),
        ("form", []),
        ("opset", "20"),
        ("opset", True),
        ("size", [64]),
        ("size", [64, 0]),
        ("size", [64, 64.5]),
        ("size", [64, 10**9]),
        ("size", "64x64"),
        ("features", 0),
        ("files", {}),
        ("files", ["onnxruntime-fp32.onnx"]),
        ("files", {"onnxruntime-fp32.onnx": "short"}),
        ("files", {"onnxruntime-fp32.onnx": None}),
        ("proof", "../x.npz"),
        ("proof", None),
        ("weights_sha256", ""),
        ("spec_digest", "ZZ" * 32),
        ("created", 0),
        ("tools", None),
        ("agreement", []),
    ],
)
def test_a_damaged_field_is_named_with_its_file(field, value):
    with pytest.raises(RepositoryError) as caught:
        Artifact.from_json(entry(**{field: value}), "mine/manifest.json")
    assert str(caught.value).startswith(f"mine/manifest.json: an artifact's '{field}' is damaged")


@pytest.mark.parametrize("field", sorted(ARTIFACT.to_json()))
def test_a_missing_field_is_refused(field):
    document = entry()
    del document[field]
    with pytest.raises(RepositoryError, match=f"'{field}' is damaged"):
        Artifact.from_json(document, "manifest.json")


@pytest.mark.parametrize("document", [None, [], "x", 3, [{}], {"name": "x", "batch": 3}])
def test_an_entry_of_another_version_is_refused(document):
    with pytest.raises(RepositoryError, match="not an artifact of this version"):
        Artifact.from_json(document, "manifest.json")


def test_a_proof_that_is_not_among_the_files_is_refused():
    with pytest.raises(RepositoryError, match="has no proof among its files"):
        Artifact.from_json(entry(proof="other.proof.npz"), "manifest.json")


def test_a_proof_cannot_be_the_file_a_runtime_opens():
    with pytest.raises(RepositoryError, match="has no proof among its files"):
        Artifact.from_json(entry(files={ARTIFACT.proof: DIGEST}), "manifest.json")


@pytest.mark.parametrize(
    ("size", "form", "features", "name"),
    [
        ((64, 64), "authored", False, "openvino-bf16"),
        ((64, 96), "authored", False, "openvino-bf16-64x96"),
        (None, "authored", False, "openvino-bf16-dynamic"),
        ((64, 64), "authored", True, "openvino-bf16-features"),
        ((64, 64), "traced", False, "openvino-bf16-traced"),
        (None, "traced", True, "openvino-bf16-dynamic-features-traced"),
    ],
)
def test_a_name_says_what_differs_from_the_plain_artifact(size, form, features, name):
    assert artifact_name("openvino", "bf16", size, (64, 64), form, features) == name
