import numpy as np
import pytest

from coat_deploy.errors import RunnerError
from coat_deploy.labels import FEW, top_classes, top_labels

LABELS = ("cat", "dog", "cow", "hen")


def top(logits, count=4):
    return top_labels(np.array(logits, dtype=np.float32), LABELS, count)


def names(logits, count=4):
    return [entry["label"] for entry in top(logits, count)]


def test_the_likeliest_label_comes_first():
    assert names([0, 3, 1, 2]) == ["dog", "hen", "cow", "cat"]


def test_equal_logits_keep_the_order_of_the_classes():
    assert names([1, 2, 2, 1]) == ["dog", "cow", "cat", "hen"]


def test_scores_are_the_softmax_of_all_logits():
    logits = np.array([0.5, -1.0, 2.0, 0.0])
    wanted = np.exp(logits) / np.exp(logits).sum()
    scores = {entry["label"]: entry["score"] for entry in top(logits)}
    assert np.allclose([scores[label] for label in LABELS], wanted, atol=1e-7)


def test_scores_of_huge_logits_stay_finite():
    assert [entry["score"] for entry in top([1e30, -1e30, 0, 0], 2)] == [1.0, 0.0]


def test_scores_do_not_depend_on_how_many_are_asked_for():
    assert top([1, 2, 3, 4], 1)[0] == top([1, 2, 3, 4], 4)[0]


def test_more_labels_than_classes_give_every_class():
    assert len(top([0, 1, 2, 3], 10)) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_rank_nothing_are_refused(value):
    with pytest.raises(RunnerError, match="NaN or infinity"):
        top([0, value, 1, 2])


@pytest.mark.parametrize("count", [1, FEW, FEW + 1, 200])
def test_few_classes_and_many_are_ranked_alike(count):
    logits = np.random.default_rng(0).integers(0, 9, 100).astype(np.float32)  # many are equal
    before = logits.copy()
    assert top_classes(logits, count) == np.argsort(-before, kind="stable")[:count].tolist()
    assert np.array_equal(logits, before)
