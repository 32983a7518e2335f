"""The main job on real photographs, start to end: `make demo`.

Exports CoaT-Lite Tiny, holds the artifacts against PyTorch on the photographs that scikit-image
carries, and measures them side by side. The weights are random, so that nothing but a package
index is needed; with a way to the Hugging Face Hub, `--weights timm` takes the published ones.
"""

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from coat_deploy.machine import describe

MODEL = "coat_lite_tiny"
ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("demo")


def photographs() -> str:
    """Return the folder of photographs inside scikit-image."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        sys.exit('demo: scikit-image is not installed. Run: pip install "coat-deploy[demo]"')
    return str(Path(spec.origin).parent / "data")


def run(*arguments: str) -> None:
    """Show a command, run it, and stop when it fails."""
    words = [*arguments, "--models", str(FOLDER)]
    print(f"\n$ coat-deploy {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Export, validate, measure and predict."""
    images = photographs()
    targets = ["eager", "onnxruntime", "openvino"]
    run("export", MODEL, "--weights", "random:0", "--target", "onnxruntime")
    if has_bf16():
        run("export", MODEL, "--target", "openvino", "--precision", "bf16")
        targets.append("openvino:bf16")
    run("validate", MODEL, "--images", images)
    plot = str(FOLDER / "bench.png")
    run("bench", MODEL, "--targets", ",".join(targets), "--batch", "1,8", "--plot", plot)
    run("predict", MODEL, str(Path(images) / "chelsea.png"), "--top", "3")


def has_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16."""
    return any(feature in describe().cpu_features for feature in ("amx_bf16", "avx512_bf16"))


if __name__ == "__main__":
    main()
