"""`coat-deploy train --streaming`: a table read on the way, stopped and taken up again."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coat_deploy.cli import stopping
from coat_deploy.train import finish

pytestmark = pytest.mark.slow

WORDS = (
    "train", "coat_lite_toy", "--streaming", "--threads=1", "--size=32", "--epochs=3",
    "--warmup-epochs=1", "--batch-size=4", "--drop-path=0.1", "--validate-every=1",
)  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A folder of parquet files, 26 images to train on and 6 to evaluate on, as a source."""
    pyarrow = pytest.importorskip("pyarrow", reason="comes with the package datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    draw = np.random.default_rng(0)
    for split, count in (("train", 26), ("validation", 6)):
        rows = []
        for number in range(count):
            label = number % 3
            file = io.BytesIO()
            pixels = draw.integers(60 * label, 60 * (label + 1), (40, 32, 3), np.uint8)
            Image.fromarray(pixels).save(file, "png")
            image = {"bytes": file.getvalue(), "path": f"{number}.png"}
            rows.append({"image": image, "label": f"class {label}"})
        (tmp_path / "table").mkdir(exist_ok=True)
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / "table" / f"{split}.parquet"
        )
    return f"parquet:{tmp_path / 'table'}"


def test_a_stream_that_was_stopped_goes_on_to_the_same_bits(cli, table, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    # It rests for seconds after every pass over files, for threads of Arrow to end.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr(finish, "pictures", lambda *_: {})
    models = tmp_path / "models"
    words = (*WORDS, "--data", table, "--models", models)
    straight = cli(*words, "--out=straight")
    assert straight.status == 0, straight.err
    for steps in (4, 7):
        asked: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(
                stopping.Stop,
                "__call__",
                lambda stop, asked=asked, steps=steps: asked.append(1) or len(asked) == steps,
            )
            assert cli(*words, "--out=stopped", "--resume").status == 143
    resumed = cli(*words, "--out=stopped", "--resume")
    assert resumed.status == 0, resumed.err
    one, other = (
        (models / name / "model.safetensors").read_bytes() for name in ("straight", "stopped")
    )
    assert one == other
