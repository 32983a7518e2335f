"""`coat-deploy train`: what it writes, prints and exits with; bad input; signals."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coat_deploy.cli import stopping
from coat_deploy.cli.app import main
from coat_deploy.train import finish, loop

QUICK = (
    "--threads=1", "--size=32", "--epochs=2", "--warmup-epochs=1", "--batch-size=8",
    "--rand-augment=0", "--jitter=0", "--validate-every=1",
)  # fmt: skip


def here(*words: object) -> tuple[int, str, str]:
    """Run a command line in this process; the fixture `cli` is not to be had for a module."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as left:
            assert isinstance(left.code, int)
            return left.code, out.getvalue(), err.getvalue()


def paint(folder: Path, classes: int = 3, images: int = 12, side: int = 40) -> Path:
    """Fill class folders with noisy pictures, brighter class by class."""
    draw = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class {label}").mkdir(parents=True)
        for number in range(images):
            pixels = draw.integers(60 * label, 60 * (label + 1), (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class {label}" / f"{number:02}.png")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file and folder below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(autouse=True)
def unpictured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the toys take to train."""
    monkeypatch.setattr(finish, "pictures", lambda *_: {})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of 12 pictures."""
    return paint(tmp_path_factory.mktemp("painted") / "pictures")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A repository of a model, `whole`, and of a training that was stopped, `half`.

    Not to be written to.
    """
    models = tmp_path_factory.mktemp("trained") / "models"
    words = ("train", "coat_lite_toy", "--data", pictures, "--models", models, *QUICK)
    status, _, said = here(*words, "--out", "whole")
    assert status == 0, said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping.Stop, "__call__", lambda stop: True)
        status, _, said = here(*words, "--out", "half")
    assert status == 143, said
    return models


@pytest.fixture
def train(cli, repository, pictures, tmp_path):
    """Train a toy on the pictures into a copy of the repository; later words win."""
    models = Path(shutil.copytree(repository, tmp_path / "models"))

    def run(*words: object, variant: str = "coat_lite_toy"):
        given = ("--data", pictures, "--models", models, "--out", "new", *QUICK, *words)
        return cli("train", variant, *given)

    return run


@pytest.fixture
def refused(train, tmp_path, caplog):
    """Check that a training is refused in one line, and that nothing was written."""

    def check(status: int, said: str, *words: object, variant: str = "coat_lite_toy") -> None:
        before = content(tmp_path)
        ran = train(*words, variant=variant)
        # A log is told on stderr, too.
        assert [told for told in caplog.messages if "head drawn at random" not in told] == []
        assert ran.status == status, ran.err
        assert ran.out == ""
        assert ran.err.startswith("coat-deploy: ") and ran.err.count("\n") == 1, ran.err
        assert said in ran.err
        assert content(tmp_path) == before

    return check


# ------------------------------------------------------------ what it does


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A repository with a toy that has learnt the digits, and what `--json` printed."""
    models = tmp_path_factory.mktemp("digits")
    status, out, said = here(
        "train", "coat_lite_toy", "--data=digits", "--out=digits", "--models", models, "--json",
        "--epochs=8", "--warmup-epochs=1", "--batch-size=32", "--learning-rate=0.03", "--threads=1",
    )  # fmt: skip
    assert status == 0, said
    return models, json.loads(out)


@pytest.mark.slow
def test_digits_are_learnt_in_a_handful_of_epochs(digits):
    _, report = digits
    assert report["top1"] >= 0.95
    assert report["images"] == 359 and report["training_images"] == 1438
    assert report["model"] == "digits" and report["epochs"] == 8


@pytest.mark.slow
def test_evaluate_finds_the_accuracy_that_training_told(digits, cli):
    models, report = digits
    ran = cli("evaluate", "digits", "--data", "digits", "--models", models, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["images"] == report["images"]
    assert ran.json["top1"] == report["top1"]
    assert ran.json["nll"] == pytest.approx(report["nll"], rel=1e-5)


@pytest.mark.slow
def test_what_was_trained_is_exported_without_further_ado(digits, cli):
    models, report = digits
    ran = cli("export", "digits", "--models", models)
    assert ran.status == 0, ran.err
    words = ("--data", "digits", "--target", "onnxruntime", "--models", models, "--json")
    exported = cli("evaluate", "digits", *words)
    assert exported.json["top1"] == pytest.approx(report["top1"], abs=1 / 359)


def test_a_training_reports_its_epochs_and_what_came_of_it(train, tmp_path):
    ran = train()
    assert ran.status == 0, ran.err
    assert [line.split("  ")[0] for line in ran.err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    first, second, third, *tables = ran.out.splitlines()
    assert first.startswith("new: top-1 ") and first.endswith(" on 3 validation images.")
    assert second.startswith("2 epochs in ") and "images/s" in second
    assert third == f"Written to {tmp_path / 'models' / 'new'}"
    assert any(line.startswith("class ") for line in tables)


def test_a_recipe_file_is_changed_by_options(train, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("epochs = 5\nlearning_rate = 0.125\n")
    ran = train("--recipe", recipe, "--json")
    assert ran.status == 0, ran.err
    written = (tmp_path / "models" / "new" / "recipe.toml").read_text()
    assert "epochs = 2 " in written and "learning_rate = 0.125 " in written


def test_resuming_what_was_stopped_finishes_it(train, tmp_path):
    ran = train("--out", "half", "--resume")
    assert ran.status == 0, ran.err
    whole, half = (
        (tmp_path / "models" / name / "model.safetensors").read_bytes()
        for name in ("whole", "half")
    )
    assert half == whole


def test_resuming_what_is_finished_reports_it_again(train, tmp_path):
    before = content(tmp_path)
    ran = train("--out", "whole", "--resume", "--json")
    assert ran.status == 0
    assert ran.err == "whole: was trained to its end before; nothing is left to do.\n"
    metrics = json.loads((tmp_path / "models" / "whole" / "metrics.json").read_text())
    assert ran.json.items() >= metrics.items()
    assert content(tmp_path) == before


def test_a_broken_image_is_left_out_and_told_once(train, pictures, tmp_path, caplog):
    broken = Path(shutil.copytree(pictures, tmp_path / "broken"))
    (broken / "class 0" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    ran = train("--data", broken, "--json")
    assert ran.status == 0, ran.err
    assert [told for told in caplog.messages if "03.png" in told] == caplog.messages[:1]
    assert ran.json["training_images"] + ran.json["images"] == 35


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--preset=smal",), 2, "Did you mean 'small'?"),
        (("--learning-rat=1",), 2, "--learning-rat"),
        (("--epochs=0",), 2, "epochs: out of range (got 0, expected 1 to 100000)"),
        (("--epochs=many",), 2, "--epochs"),
        (("--learning-rate=nan",), 2, "learning_rate: out of range (got nan"),
        (("--warmup-epochs=3",), 2, "warmup_epochs: longer than the training (got 3"),
        (("--precision=fp17",), 2, "Did you mean 'fp16'?"),
        (("--device=cpi",), 2, "Did you mean 'cpu'?"),
        (("--size=16",), 2, "size: too small for coat_lite_toy (got 16, expected at least 32)"),
        (("--train-size=16",), 2, "train_size: too small for coat_lite_toy"),
        (("--batch-size=64",), 2, "training images: fewer than one step takes (got 33"),
        (("--validation-share=1",), 2, "validation share 1: cannot be"),
        (("--label-column=kind",), 2, "has no columns, so no 'kind'"),
        (("--train-split=trian",), 2, "unknown split 'trian'"),
        (("--data=nowhere",), 2, "unknown data source 'nowhere'"),
        (("--data=digit",), 2, "Did you mean 'digits'?"),
        (("--streaming",), 2, "cannot be streamed"),
        (("--out=a/b",), 2, "model name 'a/b': cannot be"),
        (("--out=",), 2, "model name '': cannot be"),
        (("--out=.hidden",), 2, "model name '.hidden': cannot be"),
        (("--out=whole",), 2, "is a model already. Replace it with --overwrite"),
        (("--out=half",), 2, "holds a training that was not finished. Go on with --resume"),
        (("--out=half", "--resume", "--clip-norm=2"), 1, "(clip_norm: got 2.0, expected 1.0)"),
        (("--out=half", "--resume", "--split-seed=1"), 1, "(training images: got '"),
        (("--out=whole", "--resume", "--seed=1"), 2, "trained otherwise (seed: got 1, expected 0)"),
        (("--init=hole",), 2, "Did you mean 'whole'?"),
        (("--recipe=nowhere.toml",), 2, "nowhere.toml: cannot be read"),
        (("--push-to-hub=nobody",), 2, "nobody"),
    ],
)
def test_what_cannot_be_is_refused(words, status, said, refused):
    refused(status, said, *words)


def test_an_unknown_variant_is_told_the_nearest(refused):
    refused(2, "Did you mean 'coat_lite_toy'?", variant="coat_lite_toi")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat = 1.0", "Did you mean 'learning_rate'?"),
        ("epochs = 2.5", "epochs: must be a whole number (got 2.5)"),
        ("epochs = '2'", "epochs: must be a whole number (got '2')"),
        ("flip = true", "flip: must be a number (got True)"),
        ("epochs = ", "not a recipe file"),
    ],
)
def test_a_wrong_recipe_file_is_refused_by_the_field(text, said, refused, tmp_path):
    (tmp_path / "recipe.toml").write_text(text)
    refused(2, said, "--recipe", tmp_path / "recipe.toml")


def test_no_images_is_told(refused, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    refused(2, "no image in this folder", "--data", tmp_path / "empty")


def test_one_class_is_told(refused, tmp_path):
    refused(2, "only one class, 'class 0'", "--data", paint(tmp_path / "one", classes=1))


def test_images_of_one_pixel_are_told(refused, tmp_path):
    dots = paint(tmp_path / "dots", side=1)
    refused(1, "none of the 33 training images can be read. The first: ", "--data", dots)


def test_a_class_that_validation_lacks_is_told(refused, tmp_path):
    paint(tmp_path / "split" / "train", classes=3)
    paint(tmp_path / "split" / "validation", classes=2)
    said = "the splits have different classes (class 'class 2' only in train)"
    refused(2, said, "--data", tmp_path / "split")


def test_weights_of_another_variant_are_refused(refused, tmp_path):
    said = "is another network (architecture: got coat_lite_toy, expected coat_toy)"
    refused(1, said, "--init=whole", variant="coat_toy")


def test_a_file_of_weights_of_another_variant_is_refused(refused, tmp_path):
    weights = tmp_path / "models" / "whole" / "model.safetensors"
    refused(1, str(weights), "--init", weights, variant="coat_toy")


def test_models_that_cannot_be_written_are_told(refused, tmp_path):
    (tmp_path / "file").touch()
    refused(1, "cannot be written", "--models", tmp_path / "file")


def test_a_loss_that_is_no_number_is_told_with_the_images(train, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "soft_cross_entropy", lambda logits, _: logits.sum() * np.nan)
    ran = train()
    assert ran.status == 1 and ran.out == ""
    assert ran.err.count("\n") == 1
    assert "the loss is nan at step 1 (epoch 1, learning rate " in ran.err
    listed = tmp_path / "models" / "new" / "training" / "last_batch.txt"
    names = listed.read_text().splitlines()
    assert len(names) == 8 and all(Path(name).is_file() for name in names)
    assert str(listed) in ran.err and names[0] in ran.err
    assert not (tmp_path / "models" / "new" / "config.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True, timeout=30).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def test_a_full_disk_is_told_and_the_old_model_stays(small_disk, train, repository, caplog):
    shutil.copytree(repository / "whole", small_disk / "whole")
    before = content(small_disk)
    room = shutil.disk_usage(small_disk).free - (128 << 10)
    (small_disk / "filling").write_bytes(bytes(room))
    ran = train("--models", small_disk, "--out=whole", "--overwrite", "--checkpoint-minutes=0")
    assert ran.status == 1 and ran.out == ""
    # There was room for the history alone: training went on without checkpoints, to its end.
    assert caplog.messages[0].endswith("Training goes on meanwhile."), ran.err
    *epochs, last = ran.err.splitlines()
    assert [line[:9] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert last.startswith("coat-deploy: ") and "No space left on device" in last
    (small_disk / "filling").unlink()
    assert content(small_disk) == before


# ------------------------------------------------------------ signals


@pytest.fixture
def interrupting() -> Iterator[None]:
    """Handlers as a command has them: they end what runs."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_before_the_first_step_a_signal_ends_at_once(interrupting):
    with stopping.stopping_on_signals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_is_noted_and_told(interrupting, capsys):
    with stopping.stopping_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.received == signal.SIGTERM
    assert capsys.readouterr().err == "saving; once more to stop at once.\n"


def test_a_second_signal_ends_at_once(interrupting):
    now = [0.0]
    stop = stopping.Stop(clock=lambda: now[0])
    assert not stop()
    os.kill(os.getpid(), signal.SIGINT)
    now[0] = stopping.SAME_SIGNAL_S
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    stop.close()


def test_a_signal_that_a_launcher_hands_on_is_the_same_one(interrupting):
    now = [0.0]
    stop = stopping.Stop(clock=lambda: now[0])
    assert not stop()
    os.kill(os.getpid(), signal.SIGINT)
    now[0] = stopping.SAME_SIGNAL_S / 2
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop() and stop.received == signal.SIGINT
    stop.close()


def test_signals_are_handed_back(interrupting):
    before = signal.getsignal(signal.SIGTERM)
    with stopping.stopping_on_signals() as stop:
        stop()
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
