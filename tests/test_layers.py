"""The layers of docs/architecture.md, checked from syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "coat_deploy"

RANKS = {
    "version": 0, "errors": 0, "digest": 0,
    "spec": 1, "runner": 1, "machine": 1, "artifact": 1, "labels": 1,
    "json_files": 1, "engine": 1, "census": 1, "transaction": 1, "import_apart": 1, "cache": 1,
    "shared_library": 1, "finding": 1, "package": 1,
    "images": 2, "image_files": 2, "image_structure": 2,
    "model": 2, "repository": 2, "network": 2, "data": 2,
    "graph": 3,
    "backends": 4,
    "measure": 5,
    "train": 6,
    "diagnosis": 7, "open": 7, "candidate": 7, "best": 7, "export": 7, "choose": 7, "evaluate": 7,
    "inspection": 7, "study": 7, "gpu_diagnosis": 7, "triton": 7,
    "kserve": 7, "gpu_report": 7, "processing": 7, "classifier": 7,
    "labelling": 8,
    "serve": 8,
    "cli": 9,
    "__main__": 10,
}  # fmt: skip
"""A module imports, outside its own folder, only from lower ranks."""

HEAVY = {
    "torch": {
        "network/",
        "train/",
        "graph/traced.py",
        "backends/eager.py",
        "backends/aotinductor.py",
        "study/",
        "gpu_report/",
    },
    "triton": {"network/fused/kernels.py"},
    "onnxruntime": {"backends/onnxruntime"},
    "openvino": {"backends/openvino.py", "backends/openvino_compile.py"},
    "tensorrt": set(),
    "tensorrt_rtx": set(),
    "cuda": {"backends/cuda.py"},
    "onnx": {"graph/", "candidate.py", "gpu_report/placement.py"},
    "safetensors": {"network/weights.py"},
    "huggingface_hub": {"network/hub.py", "network/push.py", "data/huggingface.py"},
    "matplotlib": {"measure/plot.py", "train/curves.py"},
    "accelerate": {"train/"},
    "kornia": {"train/operations.py"},
    "tensorboardX": {"train/tensorboard.py"},
    "sklearn": {"data/digits.py"},
    "datasets": {"data/huggingface.py"},
    "triton_python_backend_utils": {"triton/preprocess_model.py"},
    "starlette": {"serve/"},
    "uvicorn": {"serve/server.py", "serve/connection.py"},
    "orjson": {"serve/replies.py", "serve/tensors_json.py"},
    "prometheus_client": {"serve/metrics.py"},
    "opentelemetry": {"serve/tracing.py"},
    "grpc": {"serve/rpc/"},
    "grpc_health": {"serve/rpc/"},
    "grpc_reflection": {"serve/rpc/"},
    "google": {"serve/rpc/"},
    "ray": {"labelling/cluster.py"},
    "pyarrow": {"labelling/", "data/huggingface.py"},
    "typer": {"cli/"},
    "rich": {"cli/"},
}
"""Where each third party may be imported at all."""

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[str, bool]]:
    """Every module a file imports, and whether the import stands at its top."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            folder = ROOT.joinpath(*str(node.module).split("."))
            for alias in node.names:  # `from coat_deploy.cli import console` is a module, too
                inner = (folder / f"{alias.name}.py").is_file()
                name = f"{node.module}.{alias.name}" if inner else str(node.module)
                yield name, id(node) in top


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=place)
def test_imports_only_from_lower_layers(file):
    mine = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if mine == "__init__":
        return
    for module, _ in imported(file):
        if not module.startswith("coat_deploy."):
            continue
        theirs = module.split(".")[1]
        # The single files of one rank may build on each other.
        beside = RANKS[theirs] == RANKS[mine] in (0, 1, 2, 7)
        assert theirs == mine or beside or RANKS[theirs] < RANKS[mine], (
            f"{place(file)} (rank {RANKS[mine]}) imports {module} (rank {RANKS[theirs]})"
        )


@pytest.mark.parametrize("file", FILES, ids=place)
def test_third_parties_stay_in_their_places(file):
    for module, _ in imported(file):
        allowed = HEAVY.get(module.split(".")[0])
        assert allowed is None or any(place(file).startswith(p) for p in allowed), (
            f"{place(file)} imports {module}; only {sorted(allowed)} may"
        )


@pytest.mark.parametrize("file", FILES, ids=place)
def test_nobody_imports_a_package_instead_of_the_defining_module(file):
    packages = {f"coat_deploy.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    for module, _ in imported(file):
        assert module not in packages | {"coat_deploy"}, f"{place(file)} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=place)
def test_measure_does_not_know_backends_and_graph_no_runtime(file):
    if place(file).startswith("measure/"):
        assert not any(module.startswith("coat_deploy.backends") for module, _ in imported(file))


@pytest.mark.parametrize("file", FILES, ids=place)
def test_only_the_command_line_prints_and_exits(file):
    if place(file).startswith("cli/"):
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exit", "input"), f"{place(file)}:{node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=place)
def test_every_module_has_a_rank_and_a_docstring(file):
    if file.name != "__init__.py" or file.parent != PACKAGE:
        assert file.relative_to(PACKAGE).with_suffix("").parts[0] in RANKS
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
