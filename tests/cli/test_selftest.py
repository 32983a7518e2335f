import json
import subprocess
import sys

import pytest

from coat_deploy.digest import sha256_file

WITHOUT = """
import sys
sys.modules |= dict.fromkeys(("torch", "onnx", "safetensors", "openvino"))
from coat_deploy.cli.app import main
main()
"""


def test_every_artifact_is_tested(cli, models):
    ran = cli("selftest", "coat_toy", "--models", models, "--json")
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["passed"] is True
    results = {r["artifact"]: r for r in ran.json["artifacts"]}
    assert set(results) == {"onnxruntime-fp32", "openvino-fp32"}
    assert all(r["passed"] and r["max_abs_difference"] < 1e-4 for r in results.values())


def test_one_target_is_tested(cli, models):
    ran = cli("selftest", "coat_toy", "--models", models, "--target", "openvino", "--json")
    assert [r["artifact"] for r in ran.json["artifacts"]] == ["openvino-fp32"]


def test_a_changed_file_fails_and_the_other_is_tested_all_the_same(cli, models, damage):
    damage(models / "coat_toy", "head")
    ran = cli("selftest", "coat_toy", "--models", models, "--json")
    assert ran.status == 3
    passed = {r["artifact"]: r["passed"] for r in ran.json["artifacts"]}
    assert passed == {"onnxruntime-fp32": False, "openvino-fp32": True}
    assert ran.json["passed"] is False
    assert ran.err.count("\n") == 1 and "onnxruntime-fp32" in ran.err


def test_an_artifact_that_computes_something_else_fails_with_figures(cli, models, damage):
    """As a miscompiled engine would: its bytes are as recorded, its results are not."""
    folder = models / "coat_toy"
    damage(folder, "serial_blocks2.0.mlp.fc1", by=5)
    proof = folder / "1" / "onnxruntime-fp32.proof.npz"
    before = json.loads((folder / "manifest.json").read_text())
    digest = sha256_file(folder / "1" / "onnxruntime-fp32.onnx")
    for artifact in before["artifacts"]:
        if artifact["target"] == "onnxruntime":
            old = artifact["files"]["onnxruntime-fp32.onnx"]
            content = proof.read_bytes()
            forged = rebind(content, old, digest)
            proof.write_bytes(forged)
            artifact["files"] |= {
                "onnxruntime-fp32.onnx": digest,
                proof.name: sha256_file(proof),
            }
    (folder / "manifest.json").write_text(json.dumps(before))
    ran = cli("selftest", "coat_toy", "--models", models, "--target", "onnxruntime", "--json")
    assert ran.status == 3
    assert "max |delta| is" in ran.json["artifacts"][0]["error"]


def rebind(content: bytes, old: str, new: str) -> bytes:
    """Return a proof for an artifact of another digest."""
    from dataclasses import replace

    from coat_deploy.measure.proof import Proof

    proof = Proof.from_bytes(content)
    assert proof.artifact_sha256 == old
    return replace(proof, artifact_sha256=new).to_bytes()


def test_it_needs_neither_torch_nor_onnx(models):
    words = ["selftest", "coat_lite_toy", "--models", str(models), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    results = {r["artifact"]: r for r in json.loads(done.stdout)["artifacts"]}
    assert results["onnxruntime-fp32"]["passed"] is True
    # A runtime that is not there is no failure of the artifact.
    assert results["openvino-fp32"]["passed"] is None
    assert "pip install" in results["openvino-fp32"]["error"]


def test_nothing_tested_is_no_pass(cli, models, monkeypatch):
    from coat_deploy.backends import openvino

    monkeypatch.setattr(openvino, "missing", lambda: "pip install it")
    ran = cli("selftest", "coat_toy", "--models", models, "--target", "openvino")
    assert ran.status == 1
    assert "pip install it" in ran.err and "skipped" in ran.out


def test_a_model_without_artifacts_says_the_command(cli, bare):
    ran = cli("selftest", "coat_toy", "--models", bare, "--target", "openvino")
    assert (ran.status, ran.out) == (1, "")
    command = f"coat-deploy export coat_toy --target openvino --models {bare}"
    assert command in ran.err


def test_the_table_names_what_failed_and_why(cli, models, damage):
    damage(models / "coat_toy", "head")
    ran = cli("selftest", "coat_toy", "--models", models)
    assert ran.out.splitlines()[0].split() == ["artifact", "max", "|delta|", "seconds"]
    assert "onnxruntime-fp32  FAILED" in ran.out and "openvino-fp32     passed" in ran.out
    assert "not the one that was exported" in ran.out


@pytest.mark.parametrize("target", ["eager", "tensort"])
def test_a_target_without_artifacts_is_refused(target, cli, models):
    ran = cli("selftest", "coat_toy", "--models", models, "--target", target)
    assert (ran.status, ran.out) == (2, "")
    assert "unknown target" in ran.err
