"""A repository of a toy model, exported for onnxruntime."""

import json
from pathlib import Path

import pytest

from coat_deploy.export import ExportOptions, export
from coat_deploy.repository import Repository


@pytest.fixture(scope="session")
def toy_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, which everyone may read."""
    root = tmp_path_factory.mktemp("models")
    folder = root / "coat_lite_toy"
    folder.mkdir()
    config = {
        "architecture": "coat_lite_toy",
        "num_classes": 5,
        "pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.9},
    }
    (folder / "config.json").write_text(json.dumps(config))
    export(Repository.open(root), folder.name, ExportOptions(weights="random:0", validate=False))
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root
