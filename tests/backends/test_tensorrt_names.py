"""Every name of TensorRT that the code uses is one of 10.16, of 11.4 and of TensorRT for RTX.

The official names are in `tensorrt_names.json`; `write_tensorrt_names.py` says where they are from
and writes them anew.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BACKENDS = HERE.parents[1] / "coat_deploy" / "backends"
LISTS = json.loads((HERE / "tensorrt_names.json").read_text(encoding="utf-8"))
FILES = sorted(BACKENDS.glob("tensorrt*.py"))

VARIABLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "error": "ParserError",
    "shapes": "IOptimizationProfile",
    "layer": "ILayer",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
}
"""What the code calls objects of TensorRT; `trt` is the module itself."""

AHEAD_OF_TIME = {
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}
"""What TensorRT for RTX alone has; used for `Flavour.ahead_of_time` alone."""

PYTHONS_OWN = {"error": {"strerror"}}
"""Attributes of other things of such a name."""


def used(file: Path) -> Iterator[tuple[str, ...]]:
    """Yield ("Builder",), ("BuilderFlag", "TF32") and ("IBuilderConfig", "set_flag")."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute):
            continue
        chain, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            chain.insert(0, value.attr)
            value = value.value
        if not isinstance(value, ast.Name):
            continue
        chain.insert(0, value.id)
        if chain[0] == "self":
            chain = chain[1:]
        if len(chain) < 2 or chain[-1].startswith("__"):
            continue
        if chain[0] in ("trt", "_trt"):
            yield tuple(chain[1:3])
        elif chain[0] in VARIABLES and chain[1] not in PYTHONS_OWN.get(chain[0], ()):
            yield VARIABLES[chain[0]], chain[1]


@pytest.mark.parametrize("library", LISTS)
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_name_is_official(file, library) -> None:
    names = LISTS[library]["names"]
    unknown = [
        ".".join(chain)
        for chain in dict.fromkeys(used(file))
        if chain[0] not in names or (len(chain) > 1 and chain[1] not in names[chain[0]])
    ]
    # What others lack is asked for by getattr, which is no attribute here.
    allowed = AHEAD_OF_TIME if library != "tensorrt-rtx" else set()
    assert set(unknown) <= allowed


def test_the_lists_are_of_the_versions_that_are_supported() -> None:
    versions = {library: entry["version"] for library, entry in LISTS.items()}
    assert set(versions) == {"tensorrt-10", "tensorrt-11", "tensorrt-rtx"}
    assert versions["tensorrt-10"].startswith("10.16.")
    assert versions["tensorrt-11"].startswith("11.4.")
    for entry in LISTS.values():
        assert {"ICudaEngine", "OnnxParser", "BuilderFlag"} <= set(entry["names"])
        assert len(entry["names"]) > 100


def test_the_code_uses_them() -> None:
    chains = {chain for file in FILES for chain in used(file)}
    assert ("OnnxParser",) in chains
    assert ("MemoryPoolType", "WORKSPACE") in chains
    assert ("IExecutionContext", "execute_async_v3") in chains
    assert ("INetworkDefinition", "get_layer") in chains
