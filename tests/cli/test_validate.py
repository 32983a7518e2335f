import json
from pathlib import Path

import pytest
from PIL import Image

from coat_deploy.cli.inputs import find


def validated(cli, models, images, *words, model="coat_lite_toy"):
    ran = cli("validate", model, "--models", models, "--images", images, "--json", *words)
    assert ran.out, ran.err
    return ran.status, ran.json


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("model", ["coat_lite_toy", "coat_toy"])
def test_a_sound_artifact_passes(model, target, cli, models, photos):
    status, report = validated(cli, models, photos, "--target", target, model=model)
    assert (status, report["passed"], report["failures"]) == (0, True, [])
    assert report["images"] == report["comparisons"] == 13
    assert report["max_abs_difference"] < 1e-4
    assert report["top1_agreement"] == 1


@pytest.mark.parametrize(
    ("batch", "counts"),
    [
        ("1,2,8", {1: 3, 2: 2, 8: 8}),
        ("4", {4: 12, 1: 1}),
        ("13", {13: 13}),
        ("5,3", {5: 10, 3: 3}),
        ("1000", {13: 13}),
    ],
)
def test_every_image_is_compared_once_whatever_the_batches(batch, counts, cli, models, photos):
    _, report = validated(cli, models, photos, "--batch", batch)
    assert report["images"] == report["comparisons"] == 13
    assert {row["batch"]: row["images"] for row in report["by_batch"]} == counts


@pytest.mark.parametrize("batch_sizes", [(1, 2, 8), (4,), (3, 5)])
@pytest.mark.parametrize("broken", [(), (0,), (0, 1, 2, 3), (5, 12)])
def test_readable_images_come_once_each_beside_broken_ones(batch_sizes, broken, own_photos):
    from coat_deploy.spec import Preprocess

    paths = sorted(own_photos.iterdir())
    for i in broken:
        paths[i].write_bytes(b"no image")
    readable = [str(path) for i, path in enumerate(paths) if i not in broken]
    images = find([own_photos], batch_sizes)
    for _ in range(2):  # a second size takes the same ones
        seen = [name for part in images.batches(Preprocess((64, 64))) for name in part.names]
        assert seen == readable


def test_batch_sizes_that_did_not_fit_are_told(cli, models, photos):
    ran = cli(
        "validate", "coat_lite_toy", "--models", models, "--images", photos, "--batch", "2,64"
    )
    assert ran.status == 0
    assert "too few images for batches of 64" in ran.err


def test_a_limit_takes_images_evenly(cli, models, photos):
    names = [Path(image.name).name for image in find([photos], [1], limit=4).found]
    assert names == ["photo_00.jpg", "photo_03.jpg", "photo_06.jpg", "photo_09.jpg"]
    _, report = validated(cli, models, photos, "--limit", "4")
    assert report["images"] == 4


def test_a_dynamic_artifact_is_compared_at_several_sizes(cli, models, photos):
    made = cli("export", "coat_toy", "--models", models, "--size", "dynamic")
    assert made.status == 0, made.err
    sizes = ("--size", "64,96x64,50x70")
    status, report = validated(cli, models, photos, *sizes, model="coat_toy")
    assert (status, report["artifact"]) == (0, "onnxruntime-fp32-dynamic")
    assert (report["images"], report["comparisons"]) == (13, 39)
    assert [row["size"] for row in report["by_size"]] == ["64x64", "96x64", "50x70"]
    assert all(row["images"] == 13 for row in report["by_size"])


def test_an_only_artifact_is_compared_at_its_own_size(cli, bare, photos):
    words = ("--weights", "random", "--size", "96x64", "--models", bare)
    assert cli("export", "coat_lite_toy", *words).status == 0
    _, report = validated(cli, bare, photos)
    assert [row["size"] for row in report["by_size"]] == ["96x64"]


def test_a_fixed_artifact_is_not_compared_at_other_sizes(cli, models, photos):
    words = ("--models", models, "--images", photos, "--size", "64,96")
    ran = cli("validate", "coat_lite_toy", *words)
    assert (ran.status, ran.out) == (2, "")
    assert "takes 64x64 only" in ran.err and "--size dynamic" in ran.err


def test_feature_maps_are_compared(cli, models, photos):
    assert cli("export", "coat_toy", "--models", models, "--features").status == 0
    words = ("--features", "--by-block")
    status, report = validated(cli, models, photos, *words, model="coat_toy")
    assert (status, report["artifact"]) == (0, "onnxruntime-fp32-features")
    assert report["top1_agreement"] is None
    assert [row["block"] for row in report["by_block"]["blocks"]][-4:] == ["x1", "x2", "x3", "x4"]


def test_class_folders_give_accuracies(cli, models, photos, tmp_path):
    for i, photo in enumerate(sorted(photos.iterdir())):
        folder = tmp_path / "classes" / ("coat", "hat", "sock")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / photo.name).symlink_to(photo)
    status, report = validated(cli, models, tmp_path / "classes")
    accuracy = report["accuracy"]
    assert (status, accuracy["images"]) == (0, 13)
    assert accuracy["top1"]["reference"] == accuracy["top1"]["candidate"]
    assert accuracy["top1"]["p_value"] == 1
    text = cli(
        "validate", "coat_lite_toy", "--models", models, "--images", tmp_path / "classes"
    ).out
    assert "Both have the same images right." in text and "95% interval" in text


def test_folders_that_are_no_labels_are_told(cli, models, photos, tmp_path):
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "cardigan").symlink_to(photos)
    words = ("--models", models, "--images", tmp_path / "classes")
    ran = cli("validate", "coat_lite_toy", *words)
    assert ran.status == 0
    assert "accuracy is not compared: folder 'cardigan' is not among" in ran.err


def test_the_report_is_kept_beside_the_artifact(cli, models, photos):
    _, report = validated(cli, models, photos)
    beside = models / "coat_lite_toy" / "1" / "onnxruntime-fp32.validation.json"
    assert report["report"] == str(beside)
    kept = json.loads(beside.read_text())
    assert {key: report[key] for key in kept} == kept
    text = beside.with_suffix(".txt").read_text()
    assert text.startswith("PASSED: coat_lite_toy onnxruntime-fp32 agrees with PyTorch")
    assert "\x1b" not in text


def test_figures_stand_beside_their_bar(cli, models, photos):
    words = ("--models", models, "--images", photos, "--min-centred-cosine", "0.99")
    lines = cli("validate", "coat_lite_toy", *words).out.splitlines()
    assert lines[0].startswith("PASSED")
    named = {line.split("  ")[0]: line for line in lines if line}
    assert named["max |delta|"].endswith("<= 0.0001")
    assert named["centred cosine"].endswith(">= 0.99")
    assert named["top-1 agreement"].endswith(">= 100%")
    assert max(map(len, lines)) <= 80


def test_a_bar_that_is_not_kept_fails_with_figures(cli, models, photos):
    words = ("--models", models, "--images", photos, "--max-abs-difference", "1e-9")
    ran = cli("validate", "coat_lite_toy", *words)
    assert ran.status == 3
    assert ran.out.startswith("FAILED: coat_lite_toy onnxruntime-fp32")
    assert "  - max |delta| is " in ran.out and "above 1e-09" in ran.out
    assert ran.err.count("\n") == 1 and "above 1e-09" in ran.err


CHANGES = [
    ("coat_lite_toy", "patch_embed1.proj", "patch_embed1"),
    ("coat_lite_toy", "patch_embed3.proj", "patch_embed3"),
    ("coat_lite_toy", "serial_blocks2.0.mlp.fc1", "serial_blocks2.0"),
    ("coat_lite_toy", "serial_blocks2.1.factoratt_crpe.proj", "serial_blocks2.1"),
    ("coat_lite_toy", "crpe3", "serial_blocks3.0"),
    ("coat_lite_toy", "cpe4", "serial_blocks4.0"),
    ("coat_lite_toy", "head", "logits"),
    ("coat_toy", "serial_blocks4.0.factoratt_crpe.q", "serial_blocks4.0"),
    ("coat_toy", "parallel_blocks.0.scale3.factoratt_crpe.proj", "parallel_blocks.0"),
    ("coat_toy", "parallel_blocks.1.mlp.fc2", "parallel_blocks.1"),
]


CHANGED = [(*change, "onnxruntime") for change in CHANGES]
CHANGED += [(*change, "openvino") for change in (CHANGES[0], CHANGES[2], CHANGES[-2])]


@pytest.mark.parametrize(("model", "weight", "block", "target"), CHANGED)
def test_a_changed_weight_fails_and_its_block_is_named(
    model, weight, block, target, cli, models, photos, damage
):
    damage(models / model, weight, target)
    words = ("--target", target, "--by-block", "--limit", "4")
    status, report = validated(cli, models, photos, *words, model=model)
    assert (status, report["passed"]) == (3, False)
    assert not report["file_as_exported"]
    assert report["max_abs_difference"] > 1e-4
    assert report["by_block"]["first_departing"] == block


def test_the_departing_block_is_told_first_and_marked(cli, models, photos, damage):
    damage(models / "coat_lite_toy", "serial_blocks2.0.mlp.fc1")
    words = ("--models", models, "--images", photos, "--by-block")
    ran = cli("validate", "coat_lite_toy", *words)
    head, _, table = ran.out.partition("\n\n")
    assert "First block that departs: serial_blocks2.0: relative error" in head
    marked = [line for line in table.splitlines() if line.endswith("<- departs")]
    assert len(marked) == 1 and marked[0].startswith("serial_blocks2.0 ")


def test_without_a_change_no_block_departs(cli, models, photos):
    words = ("--models", models, "--images", photos, "--by-block")
    ran = cli("validate", "coat_toy", *words)
    assert ran.status == 0
    assert "none departs" in ran.out


def test_another_runtime_has_its_own_artifact(cli, models, photos, damage):
    damage(models / "coat_lite_toy", "serial_blocks2.0.mlp.fc1", "openvino")
    assert validated(cli, models, photos)[0] == 0


@pytest.mark.slow
def test_a_traced_artifact_agrees_but_has_no_blocks_to_compare(cli, script, models, photos):
    # In a process of its own: PyTorch's exporter is one to print.
    made = script("export", "coat_lite_toy", "--models", models, "--form", "traced", "--json")
    assert (made.status, made.err, made.json["form"]) == (0, "", "traced")
    assert validated(cli, models, photos, "--form", "traced")[0] == 0
    words = ("--models", models, "--images", photos, "--form", "traced", "--by-block")
    ran = cli("validate", "coat_lite_toy", *words)
    assert (ran.status, ran.out) == (1, "")
    assert "--form authored" in ran.err and ran.err.count("\n") == 1


def test_real_photographs_agree(cli, models, shared_data, tmp_path):
    folder = shared_data / "clothing-256-calibration"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    status, report = validated(cli, models, folder, "--limit", "24", model="coat_toy")
    assert (status, report["images"], report["skipped"]) == (0, 24, {})
    assert report["max_abs_difference"] < 1e-4


def test_photographs_of_every_kind_are_read(cli, models, tmp_path, photos):
    photo = Image.open(next(photos.iterdir()))
    (tmp_path / "kinds").mkdir()
    for name in ("a.png", "b.webp", "c.BMP", "d.gif", "e.tiff"):
        photo.save(tmp_path / "kinds" / name)
    _, report = validated(cli, models, tmp_path / "kinds")
    assert (report["images"], report["skipped"]) == (5, {})


def test_a_file_that_changed_but_agrees_fails_all_the_same(cli, models, photos):
    import onnx

    path = models / "coat_lite_toy" / "1" / "onnxruntime-fp32.onnx"
    graph = onnx.load(path)
    graph.doc_string = "edited"
    onnx.save(graph, path)
    ran = cli("validate", "coat_lite_toy", "--models", models, "--images", photos, "--json")
    assert (ran.status, ran.json["passed"], ran.json["file_as_exported"]) == (3, False, False)
    warning, line = ran.err.splitlines()
    assert warning.startswith("warning: ") and "coat-deploy export coat_lite_toy" in warning
    assert "its file changed, though it still agrees" in line
