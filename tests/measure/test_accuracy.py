import json
import math
import time

import numpy as np
import pytest

from coat_deploy.errors import UsageError
from coat_deploy.measure.accuracy import AccuracyMeter, mcnemar, share


def logits_for(classes, count=10):
    """Logits whose first class is the given one, the rest in falling order."""
    logits = np.tile(-np.arange(count, dtype=np.float32), (len(classes), 1))
    logits[np.arange(len(classes)), classes] = 5
    return logits


# R. G. Newcombe, Statistics in Medicine 17 (1998), Table I, method 3 (Wilson score).
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_values(correct, total, low, high):
    found = share(correct, total)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_wilson_interval_of_all_mirrors_that_of_none():
    none, every = share(0, 29), share(29, 29)
    assert (none.low, every.high) == (0, 1)
    assert every.low == pytest.approx(1 - none.high)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (5, 6, 1.0),
        (0, 6, 2 / 64),
        (1, 9, 2 * (1 + 10) / 1024),
        (59, 6, 2 * sum(math.comb(65, k) for k in range(7)) / 2**65),
    ],
)
def test_mcnemar_equals_hand_worked_values(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-15)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_equals_the_published_example():
    # A. Agresti, Categorical Data Analysis: 150 against 86 discordant, z^2 = 17.36; exact tail.
    assert mcnemar(150, 86) == pytest.approx(3.716e-05, rel=1e-3)


@pytest.mark.parametrize(("first", "second"), [(3, 11), (40, 61), (900, 1100), (5000, 5200)])
def test_mcnemar_equals_scipy(first, second):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(first, first + second).pvalue
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_tens_of_thousands_is_exact_and_quick():
    start = time.perf_counter()
    assert mcnemar(20_000, 21_000) == pytest.approx(8e-7, rel=0.2)
    assert mcnemar(0, 50_000) == 0.0  # below the smallest float
    assert time.perf_counter() - start < 2


def test_counts_of_both_networks_and_their_discordance():
    meter = AccuracyMeter()
    labels = [0, 1, 2, 3, 4, 5]
    reference = logits_for([0, 1, 2, 3, 9, 9])
    candidate = logits_for([0, 1, 9, 9, 4, 9])
    meter.add(reference[:4], candidate[:4], labels[:4])
    meter.add(reference[4:], candidate[4:], labels[4:])
    found = meter.accuracy()
    assert found is not None and found.images == 6
    assert (found.top1.reference.correct, found.top1.candidate.correct) == (4, 3)
    assert (found.top1.reference_only, found.top1.candidate_only) == (2, 1)
    assert found.top1.p_value == 1.0 and found.top1.is_noise
    # Behind the first class stand 0, 1, 2, 3: of the missed labels 2 and 3 are among them.
    assert (found.top5.reference.correct, found.top5.candidate.correct) == (4, 5)


def test_a_large_difference_is_not_noise():
    meter = AccuracyMeter()
    meter.add(logits_for([1] * 40), logits_for([1] * 20 + [9] * 20), [1] * 40)
    found = meter.accuracy()
    assert found is not None
    assert found.top1.p_value == 2 / 2**20
    assert not found.top1.is_noise


def test_logits_that_are_not_finite_are_wrong():
    broken = logits_for([3])
    broken[0, 0] = math.nan
    meter = AccuracyMeter()
    meter.add(logits_for([3]), broken, [3])
    found = meter.accuracy()
    assert found is not None
    assert (found.top1.candidate.correct, found.top5.candidate.correct) == (0, 0)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_beyond_the_classes_is_a_usage_error(label):
    with pytest.raises(UsageError, match=f"label {label}: .*0 to 9"):
        AccuracyMeter().add(logits_for([1]), logits_for([1]), [label])


def test_nothing_added_has_no_accuracy():
    assert AccuracyMeter().accuracy() is None


def test_fewer_than_five_classes_have_a_top5():
    meter = AccuracyMeter()
    meter.add(logits_for([0, 1], 3), logits_for([1, 0], 3), [0, 0])
    found = meter.accuracy()
    assert found is not None and found.top5.candidate.value == 1


def test_json_holds_values_intervals_and_the_test():
    meter = AccuracyMeter()
    meter.add(logits_for([1, 2]), logits_for([1, 3]), [1, 2])
    found = meter.accuracy()
    assert found is not None
    document = json.loads(json.dumps(found.to_json()))
    assert document["images"] == 2
    assert document["top1"]["difference"] == -0.5
    assert document["top1"]["p_value"] == 1.0
    assert set(document["top5"]["reference"]) == {"value", "low", "high", "correct"}
