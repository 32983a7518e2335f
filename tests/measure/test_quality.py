import json
import math

import numpy as np
import pytest

from coat_deploy.measure.accuracy import share
from coat_deploy.measure.quality import Confusion, QualityMeter


def random_case(images=400, classes=12, seed=0, spread=2.0):
    """Logits that are right more often than chance, and their labels; the last class has none."""
    random = np.random.Generator(np.random.PCG64(seed))
    labels = random.integers(0, classes - 1, images)
    logits = random.normal(0, spread, (images, classes))
    logits[np.arange(images), labels] += spread
    return logits.astype(np.float32), labels


def softmax(logits):
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


def measure(logits, labels, batch=64):
    meter = QualityMeter(logits.shape[1])
    for start in range(0, len(labels), batch):
        meter.add(logits[start : start + batch], labels[start : start + batch])
    found = meter.quality()
    assert found is not None
    return found


def probabilities(rows):
    """Logits whose softmax is the given rows."""
    return np.log(np.asarray(rows)).astype(np.float32)


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 40])
def test_accuracy_confusion_and_likelihood_equal_scikit_learn(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = random_case(classes=classes)
    found, every = measure(logits, labels), list(range(classes))
    assert found.top1.value == pytest.approx(metrics.accuracy_score(labels, logits.argmax(1)))
    if classes > 5:
        top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=every)
        assert found.top5.value == pytest.approx(top5)
    expected = metrics.confusion_matrix(labels, logits.argmax(1), labels=every)
    np.testing.assert_array_equal(found.confusion, expected)
    loss = metrics.log_loss(labels, softmax(logits), labels=every)
    assert found.nll == pytest.approx(loss, rel=1e-6)
    present = np.unique(labels)
    recalls = metrics.recall_score(labels, logits.argmax(1), labels=present, average=None)
    assert [found.per_class[k].value for k in present] == pytest.approx(list(recalls))
    assert found.mean_class_accuracy == pytest.approx(recalls.mean())


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_calibration_error_equals_a_sum_image_by_image(spread):
    logits, labels = random_case(spread=spread)
    bins = {}
    for row, label in zip(softmax(logits), labels, strict=True):
        confidence = row.max()
        place = next(m for m in range(1, 16) if (m - 1) / 15 < confidence <= m / 15)
        bins.setdefault(place, []).append((row.argmax() == label, confidence))
    expected = 0.0
    for inside in bins.values():
        accuracy = sum(right for right, _ in inside) / len(inside)
        confidence = sum(sure for _, sure in inside) / len(inside)
        expected += len(inside) / len(labels) * abs(accuracy - confidence)
    found = measure(logits, labels)
    assert found.calibration_error == pytest.approx(expected, abs=1e-12)
    assert found.mean_confidence == pytest.approx(softmax(logits).max(axis=1).mean(), abs=1e-12)


def test_calibration_error_of_two_hand_worked_bins():
    # Bin (10/15, 11/15]: sure to 0.7 and 0.72, one right. Bin (13/15, 14/15]: 0.9, right.
    rows = probabilities([[0.7, 0.3], [0.72, 0.28], [0.1, 0.9]])
    found = measure(rows, [0, 1, 1])
    assert found.calibration_error == pytest.approx((2 * (0.71 - 0.5) + 0.1) / 3, abs=1e-7)
    filled = {round(b.high * 15): b for b in found.bins if b.images}
    assert sorted(filled) == [11, 14]
    assert (filled[11].images, filled[11].accuracy) == (2, 0.5)
    assert filled[11].confidence == pytest.approx(0.71)
    assert filled[14].gap == pytest.approx(0.1)


def test_a_confidence_on_an_edge_is_in_the_lower_bin():
    found = measure(np.zeros((1, 3), np.float32), [0])  # one third, the fifth bin's upper end
    assert [b.images for b in found.bins].index(1) == 4


def test_a_network_that_is_right_and_sure_has_no_error():
    logits = np.eye(4, dtype=np.float32) * 100
    found = measure(logits, range(4))
    assert (found.top1.value, found.nll, found.calibration_error) == (1, 0, 0)
    assert found.bins[-1].images == 4


def test_huge_logits_neither_overflow_nor_lose_the_likelihood():
    found = measure(np.array([[3e38, -3e38], [1000, 0]], np.float32), [0, 1])
    assert found.nll == pytest.approx(500)


def test_batches_do_not_change_the_figures():
    logits, labels = random_case()
    one, many = measure(logits, labels, 1), measure(logits, labels, 400)
    assert (one.top1, one.top5, one.per_class) == (many.top1, many.top5, many.per_class)
    np.testing.assert_array_equal(one.confusion, many.confusion)
    assert one.nll == pytest.approx(many.nll, rel=1e-12)
    assert one.calibration_error == pytest.approx(many.calibration_error, rel=1e-12)


def test_intervals_are_wilsons():
    logits, labels = random_case(images=50)
    found = measure(logits, labels)
    assert found.top1 == share(found.top1.correct, 50)
    assert found.per_class[3] == share(found.per_class[3].correct, int((labels == 3).sum()))


def test_a_class_without_images_has_no_share():
    found = measure(*random_case(classes=12))
    assert found.per_class[11] is None
    assert found.confusion[11].sum() == 0


def test_with_fewer_than_five_classes_the_top5_is_of_all():
    found = measure(*random_case(classes=4))
    assert found.top5.value == 1 > found.top1.value


def test_equal_logits_keep_the_order_of_the_classes():
    found = measure(np.zeros((7, 7), np.float32), range(7))
    assert (found.top1.correct, found.top5.correct) == (1, 5)


def test_logits_that_are_not_finite_are_wrong_and_spoil_no_other_figure():
    logits, labels = random_case(images=30)
    sound = measure(logits, labels)
    broken = np.concatenate([logits, logits[:2]])
    broken[30, labels[0]], broken[31, 0] = math.inf, math.nan
    found = measure(broken, [*labels, labels[0], labels[1]])
    assert (found.images, found.non_finite, found.confusion.sum()) == (32, 2, 30)
    assert (found.top1.correct, found.top5.correct) == (sound.top1.correct, sound.top5.correct)
    assert found.per_class[labels[0]].total >= sound.per_class[labels[0]].total + 1
    assert (found.nll, found.mean_confidence) == (sound.nll, sound.mean_confidence)


def test_nothing_finite_leaves_accuracy_and_no_likelihood():
    found = measure(np.full((3, 2), np.nan, np.float32), [0, 1, 1])
    assert (found.top1.value, found.non_finite) == (0, 3)
    assert (found.nll, found.mean_confidence, found.calibration_error) == (None, None, None)
    json.dumps(found.to_json(["a", "b"]), allow_nan=False)


def test_nothing_added_has_no_quality():
    assert QualityMeter(3).quality() is None


def test_most_frequent_confusions_come_first_and_right_ones_never():
    predicted = [0, 0, 0, 1, 2, 2, 1]
    found = measure(np.eye(3, dtype=np.float32)[predicted], [0, 0, 1, 1, 1, 1, 2])
    assert found.most_confused(2) == [Confusion(1, 2, 2), Confusion(1, 0, 1)]
    assert len(found.most_confused(9)) == 3


def test_json_is_by_name_and_adds_up():
    logits, labels = random_case(classes=7)
    names = [f"kind {k}" for k in range(7)]
    document = json.loads(json.dumps(measure(logits, labels).to_json(names), allow_nan=False))
    assert document["labels"] == names == list(document["per_class"])
    assert sum(map(sum, document["confusion"])) == document["images"] == 400
    assert document["per_class"]["kind 6"] == {
        "images": 0, "correct": 0, "predicted": sum(row[6] for row in document["confusion"]),
        "accuracy": None, "interval": None,
    }  # fmt: skip
    third = document["per_class"]["kind 3"]
    assert third["accuracy"] == third["correct"] / third["images"]
    assert third["interval"][0] < third["accuracy"] < third["interval"][1]
    assert sum(found["images"] for found in document["calibration_bins"]) == 400


def test_two_classes_of_one_name_stay_two_in_json():
    document = measure(np.eye(3, dtype=np.float32), range(3)).to_json(["crane", "owl", "crane"])
    assert list(document["per_class"]) == ["crane (class 0)", "owl", "crane (class 2)"]
