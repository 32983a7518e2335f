"""A report from end to end, on the CPU: real processes, PyTorch and onnxruntime."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_dry_run_checks_and_times_what_runs_on_a_cpu(tmp_path) -> None:
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import sys\n"
        "for name in ('typer', 'rich', 'safetensors', 'openvino', 'tensorrt_rtx'):\n"
        "    sys.modules[name] = None\n"
    )
    words = ("--device", "cpu", "--variants", "coat_lite_toy", "--bench", "coat_lite_toy")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "coat_deploy.gpu_report", *words, "--batch", "2"),
            *("--record", str(tmp_path / "r.jsonl"), "--budget", "400"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "r.jsonl").read_text())
    assert found["failed"] == []
    distances = {row["way"]: row["relative_to_float64"] for row in found["numerics"]}
    assert distances["eager fp32"] < 1e-5 and distances["onnxruntime fp32"] < 1e-5
    assert 1e-4 < distances["eager amp fp16"] < distances["eager amp bf16"] < 0.05
    assert {"eager fp32", "onnxruntime fp32"} <= {row["way"] for row in found["bench"]}
    reasons = {row["what"]: row["why"] for row in found["skipped"]}
    assert reasons["onnxruntime's guards"] == "they are a GPU's"
    assert done.stdout.startswith("# Ways to run CoaT")
