"""Whatever one gets wrong: one clear line on stderr, nothing on stdout, a sensible exit status."""

import contextlib
import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest


def one_line(ran, status, *said):
    """Check that a command failed as it should; return its line."""
    assert ran.status == status, ran.err
    assert ran.out == ""
    assert ran.err.startswith("coat-deploy: ") and ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    for words in said:
        assert words in ran.err
    return ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("export", "coat_lite_toi"),
        ("validate", "coat_lite_toi", "--images", "."),
        ("bench", "coat_lite_toi"),
        ("selftest", "coat_lite_toi"),
        ("models", "show", "coat_lite_toi"),
    ],
)
def test_an_unknown_model_is_told_the_nearest(words, cli, models):
    Path("image.jpg").touch()
    one_line(cli(*words, "--models", models), 2, "Did you mean 'coat_lite_toy'?")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "onnxruntim"), "Did you mean 'onnxruntime'?"),
        (("--target", "eager"), "unknown target"),
        (("--target", "openvino", "--precision", "bf61"), "Did you mean 'bf16'?"),
        (("--precision", "bf16"), "unknown precision for onnxruntime 'bf16'"),
        (("--form", "authord"), "Did you mean 'authored'?"),
        (("--size", "0"), "size '0'"),
        (("--size", "7"), "too small for coat_lite_toy (got 7, expected 32 or more a side)"),
        (("--size", "abc"), "size 'abc': not a size"),
        (("--size", "64x64x3"), "size '64x64x3'"),
        (("--size", "99999999"), "size '99999999'"),
        (("--threads", "0"), "must be 1 to 1024"),
        (("--num-classes", "0"), "--num-classes"),
        (("--max-abs-difference", "-1"), "'max_abs_difference' cannot be"),
        (("--min-top1-agreement", "100"), "expected 0 to 1"),
        (("--labels", "nosuch.txt"), "nosuch.txt: cannot be read (No such file"),
        (("--as", "../elsewhere"), "'../elsewhere'"),
        (("--as", ""), "''"),
        (("--images", "nosuch"), "nosuch: no such file or folder"),
        (("--weights", "nosuch.pth"), "nosuch.pth"),
    ],
)
def test_export_refuses(words, said, cli, models):
    before = sorted(models.rglob("*"))
    ran = cli("export", "coat_lite_toy", "--models", models, *words)
    one_line(ran, ran.status, said)
    assert ran.status == (1 if "--weights" in words else 2)
    assert sorted(models.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "openvin"), "Did you mean 'openvino'?"),
        (("--target", "eager"), "is the reference itself"),
        (("--precision", "pf32"), "Did you mean 'fp32'?"),
        (("--form", "traces"), "Did you mean 'traced'?"),
        (("--batch", "0"), "--batch: must be 1 to 1024 (got 0)"),
        (("--batch", "1,,x"), "--batch: must be whole numbers"),
        (("--size", "0"), "size '0'"),
        (("--size", "7"), "too small for coat_lite_toy"),
        (("--size", "abc"), "size 'abc'"),
        (("--size", ""), "--size: nothing given"),
        (("--limit", "0"), "--limit"),
        (("--max-relative-l2", "nan"), "'max_relative_l2' cannot be"),
    ],
)
def test_validate_refuses(words, said, cli, models, photos):
    ran = cli("validate", "coat_lite_toy", "--models", models, "--images", photos, *words)
    one_line(ran, 2, said)


@pytest.mark.parametrize("command", ["validate", "predict", "export"])
def test_a_folder_without_images_is_told(command, cli, models, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none")
    images = ("--images", tmp_path / "empty") if command != "predict" else (tmp_path / "empty",)
    ran = cli(command, "coat_lite_toy", *images, "--models", models)
    one_line(ran, 2, "empty: no image in this folder")


@pytest.mark.parametrize("command", ["validate", "predict", "export"])
def test_a_missing_folder_of_images_is_told(command, cli, models):
    images = ("--images", "nosuch") if command != "predict" else ("nosuch",)
    ran = cli(command, "coat_lite_toy", *images, "--models", models)
    one_line(ran, 2, "nosuch: no such file or folder")


def test_one_broken_image_among_many_is_skipped_or_strictly_fails(cli, models, own_photos):
    good = (own_photos / "photo_03.jpg").read_bytes()
    (own_photos / "photo_03.jpg").write_bytes(good[: len(good) // 2])
    words = ("validate", "coat_lite_toy", "--models", models, "--images", own_photos)
    ran = cli(*words, "--json")
    assert (ran.status, ran.json["images"]) == (0, 12)
    assert list(ran.json["skipped"]) == [str(own_photos / "photo_03.jpg")]
    first, second = ran.err.splitlines()
    assert first.startswith("skipped: ") and "photo_03.jpg" in first
    assert second == "1 of 13 images could not be read and were skipped."
    strict = cli(*words, "--strict")
    assert strict.status == 1
    assert "--strict is set" in strict.err.splitlines()[-1]


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_all_images_broken_is_a_failure(command, cli, models, own_photos):
    for photo in own_photos.iterdir():
        photo.write_bytes(b"\xff\xd8\xff no more")
    images = ("--images", own_photos) if command == "validate" else (own_photos,)
    ran = cli(command, "coat_lite_toy", *images, "--models", models)
    assert (ran.status, ran.out) == (1, "")
    assert len(ran.err.splitlines()) == 14
    assert ran.err.splitlines()[-1].startswith("coat-deploy: none of the 13 images can be read")


def test_export_on_broken_images_writes_nothing(cli, models, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    words = ("--models", models, "--size", "96", "--images", tmp_path / "broken.jpg")
    ran = cli("export", "coat_lite_toy", *words)
    assert (ran.status, ran.out) == (1, "")
    assert not list(models.rglob("*96*"))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("content", [b"", b"no model", "half"])
@pytest.mark.parametrize("words", [(), ("--by-block",)])
def test_a_broken_onnx_file_is_told_with_what_mends_it(content, target, words, cli, models, photos):
    path = models / "coat_lite_toy" / "1" / f"{target}-fp32.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    validated = cli(
        "validate", "coat_lite_toy", "--models", models, "--images", photos, "--target", target,
        *words,
    )  # fmt: skip
    warning, line = validated.err.splitlines()
    assert (validated.status, validated.out) == (1, "")
    assert warning.startswith("warning: ") and "not the one that was exported" in warning
    assert "not a whole ONNX model" in line
    predicted = cli("predict", "coat_lite_toy", photos, "--models", models, "--target", target)
    command = one_line(predicted, 1, "not the one that was exported").partition("Run: ")[2]
    again = cli(*shlex.split(command)[1:])
    assert again.status == 0, again.err
    assert path.read_bytes() == whole


def test_a_missing_onnx_file_is_told(cli, models, photos):
    (models / "coat_lite_toy" / "1" / "onnxruntime-fp32.onnx").unlink()
    ran = cli("predict", "coat_lite_toy", photos, "--models", models)
    one_line(ran, 1, "is missing", "coat-deploy export coat_lite_toy")


@pytest.mark.parametrize(
    "words",
    [
        ("--target", "openvino", "--precision", "fp32"),
        ("--size", "96x64"),
        ("--size", "64"),
        ("--target", "openvino", "--features"),
    ],
)
def test_a_missing_artifact_names_the_command_that_makes_it(words, cli, bare, photos, tmp_path):
    repository = bare.rename(tmp_path / "my models")
    made = ("export", "coat_toy", "--weights", "random", "--models", repository)
    assert cli(*made, "--size", "70").status == 0
    asked = ("validate", "coat_toy", "--models", repository, "--images", photos, *words)
    line = one_line(cli(*asked), 1, "no artifact for", "there: onnxruntime-fp32-70x70")
    command = shlex.split(line.partition("Run: ")[2])
    assert command[0] == "coat-deploy"
    again = cli(*command[1:])
    assert again.status == 0, again.err
    assert cli(*asked).status == 0


def test_weights_that_changed_make_an_artifact_stale(cli, models, photos):
    other = cli("export", "coat_lite_toy", "--weights", "random:9", "--models", models)
    assert other.status == 0, other.err
    words = ("--models", models, "--images", photos, "--target", "openvino")
    line = one_line(cli("validate", "coat_lite_toy", *words), 1, "another model.safetensors")
    again = cli(*shlex.split(line.partition("Run: ")[2])[1:])
    assert again.status == 0, again.err
    assert cli("validate", "coat_lite_toy", *words).status == 0


@pytest.mark.parametrize("command", ["predict", "selftest", "validate"])
def test_a_config_that_is_broken_is_told(command, cli, models, photos):
    (models / "coat_lite_toy" / "config.json").write_text("{")
    images = {"predict": (photos,), "validate": ("--images", photos), "selftest": ()}[command]
    ran = cli(command, "coat_lite_toy", *images, "--models", models)
    one_line(ran, 1, "config.json: is not JSON")


def test_a_file_in_place_of_the_repository_is_told(cli, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    ran = cli("export", "coat_lite_tiny", "--weights", "random", "--models", tmp_path / "file")
    one_line(ran, 1, f"{tmp_path}/file")


def test_a_report_that_cannot_be_kept_is_no_failure(cli, models, photos):
    (models / "coat_lite_toy" / "1" / "onnxruntime-fp32.validation.json").mkdir()
    words = ("--models", models, "--images", photos, "--json")
    ran = cli("validate", "coat_lite_toy", *words)
    assert (ran.status, ran.json["report"], ran.json["passed"]) == (0, None, True)
    assert ran.err.startswith("the report is not kept: ") and ran.err.count("\n") == 1


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs /sys")
def test_an_unwritable_repository_is_told(cli):
    """Nobody may make a folder in /sys, not even root."""
    words = ("--weights", "random", "--models", "/sys/models")
    line = one_line(cli("export", "coat_lite_tiny", *words), 1, "/sys/models", "cannot be written")
    assert "permitted" in line or "denied" in line


def wait_for(what, seconds=40.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def group_is_gone(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


def ended(process, number, status):
    """Send a signal to a command and all its processes, as a terminal does; check its end."""
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=40)
    assert process.returncode == status, err
    assert out == ""
    assert re.fullmatch(r"coat-deploy: (interrupted|terminated); nothing .*\n", err), err
    wait_for(lambda: group_is_gone(process.pid), 5)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SIGNALS = pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)


@SIGNALS
def test_an_export_that_is_interrupted_leaves_what_was_there(number, status, started, models):
    before = content(models)
    entries = set(models.rglob("*"))
    words = ("--models", models, "--form", "traced", "--weights", "random:5")
    process = started("export", "coat_toy", *words)
    wait_for(lambda: set((models / "coat_toy").iterdir()) - entries)
    time.sleep(0.2)
    ended(process, number, status)
    assert content(models) == before
    assert set(models.rglob("*")) == entries


@SIGNALS
def test_a_validation_that_is_interrupted_keeps_no_report(
    number, status, started, models, own_photos
):
    for i in range(4000):
        (own_photos / f"x{i}.jpg").symlink_to(own_photos / "photo_00.jpg")
    (own_photos / "a.jpg").touch()  # its message tells when the comparison is under way
    process = started("validate", "coat_toy", "--models", models, "--images", own_photos)
    assert process.stderr.readline().startswith("skipped: ")
    ended(process, number, status)
    assert not list(models.rglob("*validation*")) and not list(models.rglob(".*"))


def children(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@SIGNALS
def test_a_bench_that_is_interrupted_leaves_no_process(number, status, started, models):
    words = ("--models", models, "--targets", "onnxruntime,openvino", "--budget", "60")
    process = started("bench", "coat_lite_toy", *words, "--stability", "0", "--json")
    # Two contenders, and what multiprocessing itself runs.
    wait_for(lambda: len(children(process.pid)) >= 2)
    time.sleep(0.5)
    ended(process, number, status)


def test_json_of_a_failed_validation_is_whole(cli, models, photos, damage):
    damage(models / "coat_lite_toy", "head")
    ran = cli("validate", "coat_lite_toy", "--models", models, "--images", photos, "--json")
    assert ran.status == 3
    assert json.loads(ran.out)["failures"]
