"""`predict --out`, in this process and in ones that are killed."""

import os
import signal
import time

import pytest

parquet = pytest.importorskip("pyarrow.parquet", reason="comes with the packages ray and datasets")


@pytest.fixture
def tree(photos, tmp_path):
    """Photographs in two folders, of the same names, and one that is broken."""
    folder = tmp_path / "tree"
    for below in ("a", "b"):
        (folder / below).mkdir(parents=True)
        for photo in photos.iterdir():
            os.link(photo, folder / below / photo.name)
    (folder / "bad.jpg").write_bytes(b"")
    return folder


def rows(out):
    """Every row of every file, by path; no path may be there twice."""
    read = parquet.read_table(out).to_pylist()
    found = {row["path"]: row for row in read}
    assert len(found) == len(read)
    return found


def names(tree):
    return {file.relative_to(tree).as_posix() for file in tree.rglob("*.jpg")}


def written(out):
    """When each file of a folder was written."""
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.rglob("*")}


def test_labels_are_those_of_a_list(cli, models, tree, tmp_path):
    words = ("predict", "coat_lite_toy", tree, "--models", models, "--top", "3", "--json")
    listed = cli(*words).json["predictions"]
    ran = cli(*words, "--out", tmp_path / "labels", "--per-file", "4")
    assert ran.status == 0, ran.err
    assert (ran.json["images"], ran.json["errors"], ran.json["labelled"]) == (27, 1, 27)
    found = rows(tmp_path / "labels")
    assert set(found) == names(tree)
    for prediction in listed:
        row = found[os.path.relpath(prediction["image"], tree)]
        assert row["labels"] == [label["label"] for label in prediction["labels"]]
        scores = [label["score"] for label in prediction["labels"]]
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
    assert "bad.jpg: the file is empty" in found["bad.jpg"]["error"]
    assert "1 of 27 images have no labels, but a reason" in ran.err


def test_a_second_run_adds_nothing_and_later_images_alone(cli, models, tree, tmp_path):
    words = ("predict", "coat_lite_toy", tree, "--models", models, "--out", tmp_path / "labels")
    assert cli(*words).status == 0
    before = written(tmp_path / "labels")
    again = cli(*words)
    assert again.status == 0
    assert "27 images, 1 without labels\nnothing was left to do" in again.out
    assert written(tmp_path / "labels") == before
    os.link(tree / "a" / "photo_00.jpg", tree / "a" / "later.jpg")
    later = cli(*words, "--json")
    assert (later.json["images"], later.json["labelled"]) == (28, 1)
    assert set(rows(tmp_path / "labels")) == names(tree)


def test_strict_fails_for_what_has_no_labels_and_keeps_them(cli, models, tree, tmp_path):
    words = ("predict", "coat_lite_toy", tree, "--models", models, "--out", tmp_path / "labels")
    ran = cli(*words, "--strict")
    assert ran.status == 1
    assert "1 of 27 images have no labels, but a reason, and --strict is set" in ran.err
    assert len(rows(tmp_path / "labels")) == 27


def test_another_top_is_refused_by_name(cli, models, tree, tmp_path):
    words = ("predict", "coat_lite_toy", tree, "--models", models, "--out", tmp_path / "labels")
    assert cli(*words).status == 0
    ran = cli(*words, "--top", "3")
    assert (ran.status, ran.out) == (2, "")
    assert "labels of another top (got 3, there 5)" in ran.err


def test_another_artifact_is_refused_by_name(cli, models, tree, tmp_path):
    words = ("predict", "coat_lite_toy", tree, "--models", models, "--out", tmp_path / "labels")
    assert cli(*words).status == 0
    ran = cli(*words, "--target", "openvino")
    assert ran.status == 2
    assert "labels of another target (got openvino, there onnxruntime)" in ran.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--engine", "rya"), "unknown engine 'rya' (known: local, ray). Did you mean 'ray'?"),
        (("--engine", "ray"), "--engine ray: labels go into Parquet files. Add --out FOLDER."),
        (("--per-file", "9"), "--per-file: labels go into Parquet files. Add --out FOLDER."),
        (("--out", "labels", "--workers", "2"), "--workers: is for workers of Ray."),
        (("--out", "labels", "--address", "auto"), "--address: is for workers of Ray."),
    ],
)
def test_options_that_do_not_go_together_are_told(words, told, cli, models, photos):
    ran = cli("predict", "coat_lite_toy", photos, "--models", models, *words)
    assert (ran.status, ran.out) == (2, "")
    assert told in ran.err


def test_a_file_in_place_of_a_folder_is_told(cli, models, photos):
    words = ("--models", models, "--out", "labels")
    ran = cli("predict", "coat_lite_toy", photos / "photo_00.jpg", *words)
    assert ran.status == 2
    assert "--out: takes one folder of images" in ran.err
    assert not os.path.exists("labels")


def test_ray_that_is_not_installed_is_told_before_anything_is_written(
    cli, models, photos, monkeypatch
):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "ray" else there(name)
    )
    words = ("--models", models, "--out", "labels", "--engine", "ray")
    ran = cli("predict", "coat_lite_toy", photos, *words)
    assert ran.status == 1
    assert 'Run: pip install "coat-deploy[ray]"' in ran.err
    assert not os.path.exists("labels")


@pytest.mark.slow
def test_killed_runs_end_with_every_image_once(script, started, models, tree, tmp_path):
    out = tmp_path / "labels"
    words = ("predict", "coat_lite_toy", tree, "--models", models, "--out", out, "--per-file", "1")
    for parts in (2, 8):
        process = started(*words)
        while len(list(out.glob("part-*"))) < parts:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert len(list(out.glob("part-*"))) < 27
    ended = script(*words)
    assert ended.status == 0, ended.err
    assert f"{out}: 27 images, 1 without labels" in ended.out
    assert set(rows(out)) == names(tree)
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(started, models, tree, tmp_path):
    out = tmp_path / "labels"
    words = ("predict", "coat_lite_toy", tree, "--models", models, "--out", out, "--per-file", "1")
    process = started(*words)
    while not list(out.glob("part-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert told.splitlines() == [
        f"{out}: the same command goes on where this one ends.",
        "coat-deploy: interrupted; nothing was left half done.",
    ]
