"""A folder of images, and a classifier that reads names in place of pixels."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("pyarrow", reason="needs pyarrow: pip install coat-deploy[ray]")

from coat_deploy.classifier import Answer, NamedImage  # noqa: E402
from coat_deploy.errors import ImageError  # noqa: E402


class Names:
    """Answers with the name of an image; of one called `bad`, that it cannot be read."""

    sha256, top = "0" * 64, 2

    def __init__(self, folder: Path) -> None:
        spec = SimpleNamespace(digest=lambda: "1" * 64)
        model = SimpleNamespace(name="mine", folder=folder, spec=spec)
        self.source = SimpleNamespace(
            model=model, target="onnxruntime", precision="fp32", artifact=None
        )

    def __call__(self, images: Sequence[NamedImage]) -> list[Answer]:
        return [
            ImageError(f"{image.name}: is bad.")
            if "bad" in image.name
            else [{"label": image.name, "score": 0.75}, {"label": "other", "score": 0.25}]
            for image in images
        ]


@pytest.fixture
def classifier(tmp_path: Path) -> Names:
    (tmp_path / "mine").mkdir()
    return Names(tmp_path / "mine")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five images, two of one name."""
    folder = tmp_path / "images"
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "bad.jpg", "z.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder
