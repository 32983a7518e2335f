"""The main job, start to end: `make demo`.

Trains CoaT-Lite Nano on scikit-learn's handwritten digits, exports it, holds the artifacts against
PyTorch on the digits held out, accuracy included, measures them side by side, and sums up. Nothing
but a package index is needed.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from coat_deploy.cli.tables import render_table
from coat_deploy.data.sources import open_split
from coat_deploy.machine import describe
from coat_deploy.model import Model

VARIANT, DATA, NAME = "coat_lite_nano", "digits", "digits"
ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("demo")


def main() -> None:
    """Train, export, validate, measure, predict and sum up."""
    targets = {"onnxruntime": "fp32", "openvino": "fp32"}
    if any(feature in describe().cpu_features for feature in ("amx_bf16", "avx512_bf16")):
        targets["openvino:bf16"] = "bf16"
    record = FOLDER / "bench.jsonl"
    record.unlink(missing_ok=True)
    run("train", VARIANT, "--data", DATA, "--out", NAME, "--overwrite")
    for name, precision in targets.items():
        which = ("--target", name.split(":")[0], "--precision", precision)
        run("export", NAME, *which)
        run("validate", NAME, "--data", DATA, *which)
    run("bench", NAME, "--targets", ",".join(("eager", *targets)), "--batch", "1,8",
        "--record", str(record), "--plot", str(FOLDER / "bench.png"))  # fmt: skip
    run("predict", NAME, str(write_digit()), "--top", "3")
    print(summary(record))


def write_digit() -> Path:
    """Write one of the digits held out as a file and return its path."""
    path = FOLDER / "digit.png"
    held_out = open_split(DATA)
    held_out.image(0).save(path)
    print(f"\n{path} is {held_out.name(0)}, a {held_out.label_names[held_out.labels[0]]}")
    return path


def run(*arguments: str) -> None:
    """Show a command, run it, and stop when it fails."""
    words = [*arguments, "--models", str(FOLDER)]
    print(f"\n$ coat-deploy {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def summary(record: Path) -> str:
    """Return what was found out, as one table: accuracy from the reports, speed from `record`."""
    model = Model(FOLDER / NAME)
    reports = {
        (artifact.target, artifact.precision): _read(
            model.folder / "1" / f"{artifact.name}.validation.json"
        )
        for artifact in model.artifacts
    }
    trained = _read(model.folder / "metrics.json")
    rows = []
    for line in record.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        report = reports.get((result["target"], result["precision"]))
        top1 = (
            trained["top1"] if report is None else report["accuracy"]["top1"]["candidate"]["value"]
        )
        rows.append(
            (
                result["batch"], result["target"], result["precision"],
                f"{result['p50_ms']:.2f}", f"{result['ratio']:.2f}x", f"{top1:.2%}",
                report and report["max_abs_difference"],
            )
        )  # fmt: skip
    columns = ("batch", "target", "computes in", "p50 ms", "speed", "top-1", "max |delta|")
    images = trained["images"]
    return render_table(
        columns, rows, f"\n{NAME}: speed beside eager, accuracy on {images} digits held out"
    )


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


if __name__ == "__main__":
    main()
