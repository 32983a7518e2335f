"""The main job on real photographs, start to end: `make demo`.

Exports CoaT-Lite Tiny, holds the artifacts against PyTorch on photographs that scikit-image
carries, measures them side by side, and sums up. The weights are random, so that nothing but a
package index is needed; with a way to the Hugging Face Hub, `--weights timm` takes the published
ones.
"""

import json
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from coat_deploy.cli.tables import render_table
from coat_deploy.machine import describe
from coat_deploy.model import Model

MODEL = "coat_lite_tiny"
ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("demo")
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png",
    "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip


def main() -> None:
    """Export, validate, measure, predict and sum up."""
    photos = str(copy_photographs())
    targets = {"onnxruntime": "fp32", "openvino": "fp32"}
    if any(feature in describe().cpu_features for feature in ("amx_bf16", "avx512_bf16")):
        targets["openvino:bf16"] = "bf16"
    record = FOLDER / "bench.jsonl"
    record.unlink(missing_ok=True)
    for name, precision in targets.items():
        which = ("--target", name.split(":")[0], "--precision", precision)
        run("export", MODEL, "--weights", "random:0", *which)
        run("validate", MODEL, "--images", photos, *which)
    run("bench", MODEL, "--targets", ",".join(("eager", *targets)), "--batch", "1,8",
        "--record", str(record), "--plot", str(FOLDER / "bench.png"))  # fmt: skip
    run("predict", MODEL, str(FOLDER / "photos" / "chelsea.png"), "--top", "3")
    print(summary(record))


def copy_photographs() -> Path:
    """Return a folder with the photographs that scikit-image carries."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        sys.exit('demo: scikit-image is not installed. Run: pip install "coat-deploy[demo]"')
    photos = FOLDER / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        shutil.copy(Path(spec.origin).parent / "data" / name, photos / name)
    return photos


def run(*arguments: str) -> None:
    """Show a command, run it, and stop when it fails."""
    words = [*arguments, "--models", str(FOLDER)]
    print(f"\n$ coat-deploy {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def summary(record: Path) -> str:
    """Return what was found out, as one table: agreement from the reports, speed from `record`."""
    reports = {}
    for artifact in Model(FOLDER / MODEL).artifacts:
        path = FOLDER / MODEL / "1" / f"{artifact.name}.validation.json"
        report = json.loads(path.read_text(encoding="utf-8"))
        reports[artifact.target, artifact.precision] = report
    rows = []
    for line in record.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        report = reports.get((result["target"], result["precision"]), {})
        agreement = report.get("top1_agreement")
        rows.append(
            (
                result["batch"], result["target"], result["precision"],
                f"{result['p50_ms']:.1f}",
                f"{result['ratio']:.2f}x", report.get("max_abs_difference"),
                None if agreement is None else f"{agreement:.1%}",
            )
        )  # fmt: skip
    columns = ("batch", "target", "computes in", "p50 ms", "speed", "max |delta|", "same top-1")
    title = f"\n{MODEL}: speed beside eager, agreement with it on {len(PHOTOGRAPHS)} photographs"
    return render_table(columns, rows, title)


if __name__ == "__main__":
    main()
