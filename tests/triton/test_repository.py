"""What is written where: verified, whole, and over nothing that is another's."""

import errno
import json
import os
import shutil

import numpy as np
import onnx
import pytest

from coat_deploy.digest import sha256_file
from coat_deploy.graph import serialise


def files(folder):
    """Every file below a folder, hidden or not, with its digest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def one_line(ran, status, *parts):
    assert (ran.status, ran.out) == (status, "")
    assert ran.err.count("\n") == 1
    for part in parts:
        assert part in ran.err


def test_the_artifact_is_copied_to_the_byte_and_its_labels_are_written(triton, repository, models):
    assert triton().status == 0
    graph = models / "toy" / "1" / "onnxruntime-fp32.onnx"
    assert (repository / "toy" / "1" / "model.onnx").read_bytes() == graph.read_bytes()
    labels = json.loads((models / "toy" / "config.json").read_text())["label_names"]
    for name in ("toy", "toy_image"):
        assert (repository / name / "labels.txt").read_text().split("\n") == [*labels, ""]


def test_the_record_and_the_json_list_every_file_with_its_digest(triton, repository):
    told = triton("--json").json
    record = json.loads((repository / "toy" / "coat-deploy.json").read_text())
    there = files(repository)
    del there["toy/coat-deploy.json"]
    assert told["files"] == record["files"] == there
    assert told["models"] == ["toy", "toy_preprocess", "toy_image"]
    assert record["artifact"] == "onnxruntime-fp32"


def test_weights_in_a_file_beside_the_graph_come_along(
    cli, triton, repository, models, monkeypatch
):
    monkeypatch.setattr(serialise.serialise, "__defaults__", (1000,))
    assert cli("export", "toy", "--models", models).status == 0
    data = "onnxruntime-fp32.onnx.data"
    assert (models / "toy" / "1" / data).is_file()
    assert triton().status == 0
    placed = repository / "toy" / "1"
    assert {path.name for path in placed.iterdir()} == {"model.onnx", data}
    initializers = {
        name: [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
        for name, path in (
            ("copied", placed / "model.onnx"),
            ("own", models / "toy" / "1" / "onnxruntime-fp32.onnx"),
        )
    }
    for copied, own in zip(initializers["copied"], initializers["own"], strict=True):
        np.testing.assert_array_equal(copied, own)


def test_decoders_of_none_leave_the_models_for_images_out(triton, repository):
    told = triton("--decoders", 0, "--json").json
    assert told["models"] == ["toy"]
    assert [path.name for path in repository.iterdir()] == ["toy"]


def test_another_name_is_that_of_every_folder_and_config(triton, repository, configs):
    assert triton("--as", "shop-1.2").status == 0
    assert set(configs()) == {"shop-1.2", "shop-1.2_preprocess", "shop-1.2_image"}
    assert triton().status == 0  # beside the first
    assert len(configs()) == 6


def test_what_an_earlier_run_wrote_is_replaced_and_what_is_no_more_is_removed(triton, repository):
    assert triton().status == 0
    cache = repository / "toy_preprocess" / "1" / "__pycache__"
    cache.mkdir()
    (cache / "model.cpython-311.pyc").write_bytes(b"left by the server")
    assert triton("--artifact", "onnxruntime-fp32-features").status == 0
    assert "toy/labels.txt" not in files(repository)
    assert triton("--decoders", 0).status == 0
    assert [path.name for path in repository.iterdir()] == ["toy"]


def test_the_same_again_changes_no_byte(triton, repository):
    assert triton().status == 0
    before = files(repository)
    assert triton().status == 0
    assert files(repository) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("toy/config.pbtxt", "was changed since an earlier"),
        ("toy/1/model.onnx", "was changed since an earlier"),
        ("toy/notes.txt", "is not of an earlier"),
        ("toy_image/2/model.onnx", "is not of an earlier"),
        ("toy_preprocess/1/__init__.py", "is not of an earlier"),
    ],
)
def test_a_file_that_is_anothers_is_left_alone(triton, repository, name, reason):
    assert triton().status == 0
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("mine")
    before = files(repository)
    one_line(triton(), 2, f"{repository / name}: is in the way: it {reason}", "--out")
    assert files(repository) == before


def test_a_model_that_another_wrote_is_left_alone(triton, repository):
    (repository / "toy_image").mkdir(parents=True)
    (repository / "toy_image" / "config.pbtxt").write_text('name: "toy_image"')
    before = files(repository)
    one_line(triton(), 2, "toy_image/config.pbtxt: is in the way")
    assert files(repository) == before


def test_a_folder_that_is_a_link_is_left_alone(triton, repository, tmp_path):
    assert triton().status == 0
    shutil.move(repository / "toy", tmp_path / "elsewhere")
    (repository / "toy").symlink_to(tmp_path / "elsewhere")
    one_line(triton(), 2, f"{repository / 'toy'}: is in the way")


def test_a_folder_that_triton_would_stumble_over_is_refused(triton, repository, models, cli):
    (repository / "src").mkdir(parents=True)
    one_line(triton(), 2, f"{repository}: is not a repository of Triton's (it holds 'src'")
    ran = cli("triton", "toy", "--models", models, "--out", models)
    one_line(ran, 2, "(it holds 'toy', which has no config.pbtxt)")


def test_a_file_in_place_of_the_folder_is_refused(triton, repository):
    repository.write_text("")
    one_line(triton(), 2, f"{repository}: is not a folder")


def test_a_record_that_lists_strangers_files_removes_none(triton, repository, tmp_path):
    assert triton().status == 0
    (tmp_path / "precious").write_text("mine")
    record = repository / "toy" / "coat-deploy.json"
    document = json.loads(record.read_text())
    document["files"]["../precious"] = sha256_file(tmp_path / "precious")
    record.write_text(json.dumps(document))
    assert triton().status == 0
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("step", [1, 2, 3, 10, 19])
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over an earlier one"])
def test_a_full_disk_at_any_step_leaves_what_was_there(
    triton, repository, monkeypatch, step, earlier
):
    if earlier:
        assert triton("--artifact", "onnxruntime-fp32-features").status == 0
    before = files(repository)
    left, replace = step, os.replace

    def full(*paths):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", full)
    one_line(triton(), 1, "cannot be written (No space left on device)")
    assert files(repository) == before
    assert earlier or not repository.exists()


def test_an_artifact_that_was_changed_or_is_stale_is_refused(triton, repository, models):
    graph = models / "toy" / "1" / "onnxruntime-fp32.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content + b"x")
    one_line(triton(), 1, f"{graph}: the file is not the one that was exported")
    graph.write_bytes(content)
    config = models / "toy" / "config.json"
    document = json.loads(config.read_text())
    document["label_names"][0] = "rucksack"
    config.write_text(json.dumps(document))
    one_line(triton(), 1, "was exported from another config.json")
    assert not repository.exists()
