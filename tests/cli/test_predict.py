import json

import pytest

from coat_deploy.model import Model
from coat_deploy.open import default_target


def test_every_image_gets_its_likeliest_labels(cli, models, photos):
    ran = cli("predict", "coat_lite_toy", photos, "--models", models, "--json", "--top", "3")
    assert ran.status == 0
    assert ran.err == "coat_lite_toy: its weights are random:0; the labels mean nothing.\n"
    found = ran.json["predictions"]
    assert [p["image"] for p in found] == [str(photo) for photo in sorted(photos.iterdir())]
    for prediction in found:
        scores = [label["score"] for label in prediction["labels"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        assert 0 < sum(scores) <= 1 + 1e-6


def test_targets_give_the_same_labels(cli, models, photos):
    def labels(target):
        words = ("--models", models, "--target", target, "--json")
        ran = cli("predict", "coat_toy", photos, *words)
        assert ran.json["target"] == target
        return [[label["label"] for label in p["labels"]] for p in ran.json["predictions"]]

    assert labels("eager") == labels("onnxruntime") == labels("openvino")


def test_batches_do_not_change_the_result(cli, models, photos):
    def scores(batch):
        words = ("--models", models, "--batch", batch, "--top", "1", "--json")
        ran = cli("predict", "coat_lite_toy", photos, *words)
        return [p["labels"][0]["score"] for p in ran.json["predictions"]]

    assert scores(1) == pytest.approx(scores(5), abs=1e-5)


def test_more_labels_than_there_are_gives_all(cli, models, photos):
    words = ("--models", models, "--top", "99", "--json")
    ran = cli("predict", "coat_lite_toy", photos / "photo_00.jpg", *words)
    labels = ran.json["predictions"][0]["labels"]
    assert len(labels) == 10
    assert sum(label["score"] for label in labels) == pytest.approx(1)


def test_an_image_is_a_block_of_labels(cli, models, photos):
    ran = cli("predict", "coat_lite_toy", photos, "--models", models, "--top", "2")
    first, *labels = ran.out.split("\n\n")[0].splitlines()
    assert first == str(photos / "photo_00.jpg")
    assert len(labels) == 2 and all("%  " in label for label in labels)


def test_one_label_an_image_is_a_line_each(cli, models, photos):
    ran = cli("predict", "coat_lite_toy", photos, "--models", models, "--top", "1")
    lines = ran.out.splitlines()
    assert len(lines) == 14
    assert lines[1].endswith(str(photos / "photo_00.jpg"))


def test_onnxruntime_is_preferred_whatever_was_exported_last(models):
    assert default_target(Model(models / "coat_lite_toy")) == "onnxruntime"


def test_what_is_installed_is_preferred(models, monkeypatch):
    from coat_deploy.backends import onnxruntime

    monkeypatch.setattr(onnxruntime, "missing", lambda: "pip install it")
    assert default_target(Model(models / "coat_lite_toy")) == "openvino"


def test_eager_serves_a_model_without_artifacts(cli, models, photos):
    (models / "coat_lite_toy" / "manifest.json").unlink()
    ran = cli("predict", "coat_lite_toy", photos, "--models", models, "--json")
    assert (ran.status, ran.json["target"]) == (0, "eager")


def test_an_artifact_of_another_size_gets_images_of_that_size(cli, bare, photos):
    words = ("--weights", "random", "--size", "96x64", "--models", bare)
    assert cli("export", "coat_lite_toy", *words).status == 0
    ran = cli("predict", "coat_lite_toy", photos, "--models", bare, "--json")
    assert (ran.status, len(ran.json["predictions"])) == (0, 13)


def test_a_model_without_classifier_predicts_nothing(cli, models, photos):
    path = models / "coat_lite_toy" / "config.json"
    document = json.loads(path.read_text())
    document |= {"num_classes": 0, "label_names": []}
    path.write_text(json.dumps(document))
    ran = cli("predict", "coat_lite_toy", photos, "--models", models)
    assert (ran.status, ran.out) == (2, "")
    assert "no classifier" in ran.err


def test_a_damaged_artifact_predicts_nothing(cli, models, photos, damage):
    damage(models / "coat_lite_toy", "head")
    ran = cli("predict", "coat_lite_toy", photos, "--models", models)
    assert (ran.status, ran.out) == (1, "")
    assert "not the one that was exported" in ran.err


def test_broken_images_are_skipped_or_strictly_fail(cli, models, own_photos):
    (own_photos / "a.jpg").write_bytes(b"")
    words = ("predict", "coat_lite_toy", own_photos, "--models", models, "--json")
    ran = cli(*words)
    assert (ran.status, len(ran.json["predictions"])) == (0, 13)
    assert list(ran.json["skipped"]) == [str(own_photos / "a.jpg")]
    strict = cli(*words, "--strict")
    assert (strict.status, strict.out) == (1, ran.out)


def test_a_precision_alone_chooses_the_target_that_has_it(models):
    model = Model(models / "coat_lite_toy")
    assert default_target(model) == "onnxruntime"
    assert default_target(model, "int8") == "eager"
