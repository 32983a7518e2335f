import json
import multiprocessing
import os

import pyarrow.parquet as pq
import pytest

from coat_deploy.errors import LabellingError, RepositoryError, UsageError
from coat_deploy.labelling.folder import open_job, plan_images, summarise
from coat_deploy.labelling.part import label_part

NAMES = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "bad.jpg", "z.png"]


def rows(out):
    return [row for file in sorted(out.glob("part-*.parquet")) for row in read(file)]


def read(file):
    return pq.read_table(file).to_pylist()


def test_every_image_is_a_row_by_its_relative_path(images, classifier, tmp_path):
    out = tmp_path / "deep" / "labels"
    with open_job(images, out, classifier) as job:
        parts = plan_images(job, 2)
        assert [(part.file, part.images) for part in parts] == [
            ("part-0000-000000.parquet", 2),
            ("part-0000-000001.parquet", 2),
            ("part-0000-000002.parquet", 1),
        ]
        told = [label_part(job, part) for part in parts]
        assert [(one.images, one.errors) for one in told] == [(2, 0), (2, 1), (1, 0)]
        assert plan_images(job, 2) == []
    found = rows(out)
    assert [row["path"] for row in found] == NAMES
    assert found[2] == {
        "path": "b/1.jpg", "labels": ["b/1.jpg", "other"], "scores": [0.75, 0.25], "error": None,
    }  # fmt: skip
    assert found[3] == {
        "path": "bad.jpg", "labels": None, "scores": None, "error": "bad.jpg: is bad.",
    }  # fmt: skip
    summary = summarise(out)
    assert (summary.images, summary.errors) == (5, 1)


def test_files_tell_what_their_labels_are_of(images, classifier, tmp_path):
    with open_job(images, tmp_path / "out", classifier) as job:
        (part,) = plan_images(job, 5)
        label_part(job, part)
    metadata = pq.read_schema(tmp_path / "out" / part.file).metadata
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert json.loads(metadata[b"coat-deploy"]) == manifest
    assert (manifest["model"], manifest["sha256"], manifest["top"]) == ("mine", "0" * 64, 2)
    assert manifest["images"] == str(images)


def test_images_that_came_later_are_planned_behind(images, classifier, tmp_path):
    out = tmp_path / "out"
    with open_job(images, out, classifier) as job:
        label_part(job, plan_images(job, 2)[1])
    (images / "a" / "0.jpg").write_bytes(b"")
    with open_job(images, out, classifier) as job:
        left = plan_images(job, 7)
        assert [part.file for part in left] == [
            "part-0000-000000.parquet", "part-0000-000002.parquet", "part-0001-000000.parquet",
        ]  # fmt: skip
        for part in left:
            label_part(job, part)
    assert sorted(row["path"] for row in rows(out)) == sorted(["a/0.jpg", *NAMES])


def test_a_part_that_is_labelled_twice_is_there_once(images, classifier, tmp_path):
    with open_job(images, tmp_path / "out", classifier) as job:
        parts = plan_images(job, 3)
        for part in (*parts, *parts):
            label_part(job, part)
    assert [row["path"] for row in rows(tmp_path / "out")] == NAMES


@pytest.mark.parametrize("reader", ["arrow", "pandas"])
def test_readers_of_folders_see_labels_alone(reader, images, classifier, tmp_path):
    out = tmp_path / "out"
    with open_job(images, out, classifier) as job:
        for part in plan_images(job, 2):
            label_part(job, part)
    if reader == "arrow":
        paths = pq.read_table(out)["path"].to_pylist()
    else:
        paths = list(pytest.importorskip("pandas").read_parquet(out)["path"])
    assert sorted(paths) == NAMES


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sha256", f"labels of another sha256 (got {'2' * 64}, there {'0' * 64})"),
        ("top", "labels of another top (got 3, there 2)"),
    ],
)
def test_labels_of_something_else_are_not_mixed_in(change, words, images, classifier, tmp_path):
    with open_job(images, tmp_path / "out", classifier):
        pass
    setattr(classifier, change, {"sha256": "2" * 64, "top": 3}[change])
    with (
        pytest.raises(UsageError, match="another --out") as told,
        open_job(images, tmp_path / "out", classifier),
    ):
        pass
    assert words in str(told.value)


def test_labels_of_another_folder_are_not_mixed_in(images, classifier, tmp_path):
    with open_job(images, tmp_path / "out", classifier):
        pass
    with (
        pytest.raises(UsageError, match="labels of another images"),
        open_job(images / "a", tmp_path / "out", classifier),
    ):
        pass


def test_a_folder_of_other_things_is_left_alone(images, classifier, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(UsageError, match=r"not a folder of labels \(it holds 'thesis.txt'\)"),
        open_job(images, tmp_path / "out", classifier),
    ):
        pass
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def hold(images, out, classifier, held, done):
    with open_job(images, out, classifier):
        held.set()
        done.wait(60)


def test_two_processes_do_not_fill_one_folder(images, classifier, tmp_path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(images, tmp_path / "out", classifier, held, done))
    other.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(LabellingError, match="another process is filling it"),
            open_job(images, tmp_path / "out", classifier),
        ):
            pass
    finally:
        done.set()
        other.join(60)
    with open_job(images, tmp_path / "out", classifier) as job:
        assert len(plan_images(job, 5)) == 1


def test_what_a_killed_run_left_aside_is_cleared_away(images, classifier, tmp_path):
    with open_job(images, tmp_path / "out", classifier):
        (tmp_path / "out" / ".aside-0123").write_bytes(b"half")
    with open_job(images, tmp_path / "out", classifier):
        assert not list((tmp_path / "out").glob(".*"))


def test_a_torn_file_is_told(images, classifier, tmp_path):
    with open_job(images, tmp_path / "out", classifier) as job:
        (part,) = plan_images(job, 5)
        label_part(job, part)
    path = tmp_path / "out" / part.file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RepositoryError, match="Remove it and run again"):
        summarise(tmp_path / "out")


def test_a_name_that_is_not_utf_8_is_told(images, classifier, tmp_path):
    with open(os.fsencode(images) + b"/\xff.jpg", "wb"):
        pass
    with (
        open_job(images, tmp_path / "out", classifier) as job,
        pytest.raises(UsageError, match=r"not UTF-8 \(b'\\xff.jpg'\)"),
    ):
        plan_images(job, 5)
