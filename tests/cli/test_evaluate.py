"""`evaluate`: on class folders of photographs, on digits, on what cannot be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from coat_deploy.cli.evaluate import choose_target
from coat_deploy.cli.quality_report import render_quality
from coat_deploy.measure.quality import QualityMeter
from coat_deploy.model import Model

WORDS = ("evaluate", "coat_lite_toy")


@pytest.fixture
def labelled(photos, tmp_path) -> Path:
    """Photographs in folders named by labels of the toy models, though in no order of theirs."""
    for i, photo in enumerate(sorted(photos.iterdir())):
        folder = tmp_path / "labelled" / ("sock", "bag", "hat")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder)
    return tmp_path / "labelled"


def predicted(cli, models, labelled, *words):
    """What `predict` makes of every photograph: (its folder, the labels it gives)."""
    ran = cli("predict", "coat_lite_toy", labelled, "--models", models, "--json", *words)
    return [
        (Path(p["image"]).parent.name, [label["label"] for label in p["labels"]])
        for p in ran.json["predictions"]
    ]


@pytest.mark.parametrize("target", ["eager", "onnxruntime", "openvino"])
def test_figures_are_those_of_predict(target, cli, models, labelled):
    words = ("--target", target)
    ran = cli(*WORDS, "--data", labelled, "--models", models, "--json", *words)
    assert ran.status == 0, ran.err
    assert ran.err == "coat_lite_toy: its weights are random:0; the figures mean nothing.\n"
    guesses, found = predicted(cli, models, labelled, *words), ran.json
    assert (found["target"], found["images"], found["skipped"]) == (target, 13, {})
    assert found["top1"] == sum(own == labels[0] for own, labels in guesses) / 13
    assert found["top5"] == sum(own in labels for own, labels in guesses) / 13
    confusion = np.zeros((10, 10), int)
    for own, labels in guesses:
        confusion[found["labels"].index(own), found["labels"].index(labels[0])] += 1
    assert found["confusion"] == confusion.tolist()
    assert found["per_class"]["bag"]["images"] == 4
    assert found["per_class"]["boot"]["accuracy"] is None


def test_eager_is_the_default_and_without_weights_the_artifact(cli, models, labelled):
    words = (*WORDS, "--data", labelled, "--models", models, "--json")
    eager = cli(*words).json
    assert (eager["target"], eager["artifact"], eager["precision"]) == ("eager", None, "fp32")
    (models / "coat_lite_toy" / "model.safetensors").unlink()
    artifact = cli(*words).json
    assert (artifact["target"], artifact["artifact"]) == ("onnxruntime", "onnxruntime-fp32")
    assert artifact["nll"] == pytest.approx(eager["nll"], abs=1e-4)


def test_without_pytorch_the_artifact_is_the_default(models, monkeypatch):
    from coat_deploy.backends import eager

    monkeypatch.setattr(eager, "missing", lambda: "pip install it")
    assert choose_target(Model(models / "coat_lite_toy"), None) == "onnxruntime"


def test_a_precision_that_was_not_exported_is_told_how(cli, models, labelled):
    ran = cli(*WORDS, "--data", labelled, "--models", models, "--precision", "bf16")
    assert (ran.status, ran.out) == (1, "")
    assert "coat-deploy export coat_lite_toy --target openvino --precision bf16" in ran.err


def test_another_size_and_crop_change_the_pixels(cli, models, labelled):
    words = (*WORDS, "--data", labelled, "--models", models, "--json")
    own, other = cli(*words), cli(*words, "--size", "96x64", "--crop-pct", "1")
    assert (own.json["size"], own.json["crop_pct"]) == ([64, 64], 0.9)
    assert (other.json["size"], other.json["crop_pct"]) == ([96, 64], 1)
    assert own.json["nll"] != other.json["nll"]


def test_an_artifact_of_another_size_names_the_export(cli, models, labelled):
    words = ("--target", "onnxruntime", "--size", "96")
    ran = cli(*WORDS, "--data", labelled, "--models", models, *words)
    assert (ran.status, ran.out) == (1, "")
    assert "coat-deploy export coat_lite_toy --target onnxruntime --size 96x96" in ran.err


def test_batches_do_not_change_the_figures(cli, models, labelled):
    def figures(batch):
        words = ("--batch", batch, "--json")
        found = cli(*WORDS, "--data", labelled, "--models", models, *words).json
        return found["top1"], found["confusion"], pytest.approx(found["nll"], abs=1e-5)

    assert figures(1) == figures(5)


def test_a_limit_is_kept(cli, models, labelled):
    ran = cli(*WORDS, "--data", labelled, "--models", models, "--limit", "4", "--json")
    assert ran.json["images"] == 4


def test_what_a_training_held_out_can_be_evaluated_alone(cli, models, labelled):
    from coat_deploy.data.sources import DataOptions, open_splits

    held = open_splits(str(labelled), DataOptions(validation_share=0.4, seed=3)).validation
    words = ("--split", "validation", "--validation-share", "0.4", "--split-seed", "3", "--json")
    ran = cli(*WORDS, "--data", labelled, "--models", models, *words)
    assert ran.status == 0, ran.err
    assert (ran.json["split"], ran.json["images"]) == ("validation", len(held))
    assert ran.json["images"] < 13


def test_a_broken_image_is_skipped_or_strictly_fails(cli, models, labelled):
    (labelled / "bag" / "a.jpg").write_bytes(b"\xff\xd8\xff no more")
    words = (*WORDS, "--data", labelled, "--models", models, "--json")
    ran = cli(*words)
    assert (ran.status, ran.json["images"], len(ran.json["skipped"])) == (0, 13, 1)
    told = [line for line in ran.err.splitlines() if "a.jpg" in line]
    assert len(told) == 1 and told[0].startswith("skipped: ")
    assert ran.err.endswith("1 of 14 images could not be read and were skipped.\n")
    strict = cli(*words, "--strict")
    assert (strict.status, strict.json["images"]) == (1, 13)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--target", "onnxruntim"), 2, "Did you mean 'onnxruntime'?"),
        (("--precision", "pf32"), 2, "Did you mean 'fp32'?"),
        (("--target", "eager", "--precision", "bf16"), 2, "unknown precision for eager 'bf16'"),
        (("--size", "7"), 2, "too small for coat_lite_toy"),
        (("--size", "abc"), 2, "size 'abc'"),
        (("--crop-pct", "0"), 2, "--crop-pct: must be between 0.1 and 1 (got 0)"),
        (("--crop-pct", "nan"), 2, "--crop-pct: must be between 0.1 and 1 (got nan)"),
        (("--batch", "0"), 2, "--batch"),
        (("--limit", "0"), 2, "--limit"),
        (("--split", "nosuch"), 2, "unknown split 'nosuch'"),
        (("--validation-share", "1"), 2, "validation share 1"),
        (("--image-column", "img"), 2, "has no columns"),
        (("--data", "nosuch"), 2, "nosuch"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words, status, said, cli, models, labelled):
    ran = cli(*WORDS, "--data", labelled, "--models", models, *words)
    assert (ran.status, ran.out) == (status, ""), ran.err
    assert said in ran.err and ran.err.count("\n") == 1


def test_data_of_other_classes_names_both(cli, models, labelled):
    (labelled / "sock").rename(labelled / "scarf")
    ran = cli(*WORDS, "--data", labelled, "--models", models)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "class 'scarf' is none of the 10 labels" in ran.err
    assert "'bag', 'boot', 'coat'" in ran.err


def test_a_model_without_classifier_is_told(cli, models, labelled):
    path = models / "coat_lite_toy" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"num_classes": 0, "label_names": []})
    )
    ran = cli(*WORDS, "--data", labelled, "--models", models)
    assert (ran.status, ran.out) == (2, "")
    assert "no classifier" in ran.err


def test_a_damaged_artifact_is_not_evaluated(cli, models, labelled, damage):
    damage(models / "coat_lite_toy", "head")
    words = ("--target", "onnxruntime")
    ran = cli(*WORDS, "--data", labelled, "--models", models, *words)
    assert (ran.status, ran.out) == (1, "")
    assert "not the one that was exported" in ran.err


def test_digits_are_evaluated_without_a_download(cli, bare):
    pytest.importorskip("sklearn")
    from coat_deploy.data.sources import DataOptions, open_split

    data = open_split("digits", None, DataOptions())
    path = bare / "coat_lite_toy" / "config.json"
    names = {"label_names": list(reversed(data.label_names))}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    made = cli("export", "coat_lite_toy", "--weights", "random:0", "--models", bare)
    assert made.status == 0, made.err
    ran = cli(*WORDS, "--data", "digits", "--models", bare, "--json")
    assert ran.status == 0, ran.err
    counts = np.bincount(data.labels)
    assert ran.json["images"] == len(data) == counts.sum()
    for name, count in zip(data.label_names, counts, strict=True):
        assert ran.json["per_class"][name]["images"] == count


def test_the_table_is_headline_classes_confusions_and_speed(cli, models, labelled):
    ran = cli(*WORDS, "--data", labelled, "--models", models, "--target", "onnxruntime")
    parts = ran.out.split("\n\n")
    assert parts[0].startswith("coat_lite_toy onnxruntime-fp32 on 13 images: top-1 ")
    classes = [line.split()[0] for line in parts[1].splitlines()]
    assert sorted(classes[1:-1]) == ["bag", "hat", "sock"]
    assert parts[1].endswith("7 of the model's 10 classes had no image.")
    assert parts[-1].startswith("64x64, crop 0.9, ")
    assert max(map(len, ran.out.splitlines())) <= 80


def report(predicted, labels, classes):
    meter = QualityMeter(classes)
    meter.add(np.eye(classes, dtype=np.float32)[predicted], labels)
    return render_quality("it", meter.quality(), [f"k{i}" for i in range(classes)])


def test_worst_classes_come_first_and_the_rest_are_summed_up():
    labels = [k for k in range(25) for _ in range(2)]
    predicted = list(labels)
    predicted[14] = predicted[15] = 0  # both of class 7
    predicted[6] = 0  # one of class 3
    lines = report(predicted, labels, 25).split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["k7", "k3", "k0"]
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "and 5 more: 10 of 10 images right (100.00%)"


def test_the_three_most_frequent_confusions_are_told():
    text = report([1, 1, 1, 2, 2, 0, 0, 1], [0, 0, 0, 0, 0, 1, 2, 2], 3)
    assert "k0 taken for k1       3\nk0 taken for k2       2\nk1 taken for k0       1\n" in text


def test_logits_that_are_not_finite_are_told():
    meter = QualityMeter(2)
    meter.add(np.array([[0, np.nan]], np.float32), [0])
    text = render_quality("it", meter.quality(), ["a", "b"])
    assert "\n1 image had NaN or infinite logits: counted as wrong.\n" in text
    assert "confidence" not in text


def test_without_mistakes_no_confusion_is_told():
    text = report([0, 1], [0, 1], 2)
    assert text.startswith("it on 2 images: top-1 100.00%, top-2 100.00%.\n")
    assert "\n95% intervals: 34.2% to 100.0%, 34.2% to 100.0%.\n" in text
    assert "taken for" not in text
