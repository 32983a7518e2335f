from coat_deploy.cli.training_report import MAX_CLASSES, render_training

REPORT = {
    "model": "shirts",
    "folder": "/models/shirts",
    "images": 10,
    "top1": 0.8,
    "top5": 1.0,
    "top1_interval": [0.49, 0.94],
    "epochs": 4,
    "seconds": 90.0,
    "images_per_s": 431.6,
    "data_share": 0.066,
    "checkpoint_share": 0.0012,
    "labels": ["hat", "shirt", "shoe"],
    "per_class": {
        "hat": {"images": 4, "correct": 4, "accuracy": 1.0},
        "shirt": {"images": 6, "correct": 4, "accuracy": 4 / 6},
        "shoe": {"images": 0, "correct": 0, "accuracy": None},
    },
    "confusion": [[4, 0, 0], [1, 4, 1], [0, 0, 0]],
}


def test_report_tells_accuracy_time_and_place():
    text = render_training(REPORT)
    assert "shirts: top-1 80.0% (95%: 49.0% to 94.0%), top-5 100.0% on 10 validation" in text
    assert "4 epochs in 1.5 min, 432 images/s; data 7% of a step, checkpoints 0.1%" in text
    assert "Written to /models/shirts" in text


def test_hardest_class_comes_first_and_one_without_images_not_at_all():
    table = render_training(REPORT).split("Written to")[1].split("most confused")[0]
    assert table.index("shirt ") < table.index("hat ")
    assert "66.7%" in table
    assert "shoe" not in table


def test_what_is_confused_is_told():
    text = render_training(REPORT)
    assert "shirt taken for hat" in text
    assert "shirt taken for shoe" in text


def test_many_classes_are_cut_short():
    names = [f"class {i}" for i in range(MAX_CLASSES + 5)]
    rows = {name: {"images": 1, "correct": 1, "accuracy": 1.0} for name in names}
    confusion = [[int(i == j) for j in range(len(names))] for i in range(len(names))]
    text = render_training(REPORT | {"labels": names, "per_class": rows, "confusion": confusion})
    assert "and 5 more" in text
    assert "taken for" not in text


def test_unknown_pace_is_left_out():
    lost = dict.fromkeys(("images_per_s", "data_share", "checkpoint_share"))
    text = render_training(REPORT | lost)
    assert "4 epochs in 1.5 min." in text
    assert "None" not in text
