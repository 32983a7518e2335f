import json

import numpy as np
import pytest

from coat_deploy.errors import RunnerError, UsageError
from coat_deploy.measure.bar import BARS
from coat_deploy.measure.validate import Batch, batch_sizes_in_turn, validate
from coat_deploy.runner import TensorSpec

WEIGHTS = np.random.Generator(np.random.PCG64(3)).normal(0, 40, (3 * 4, 10)).astype(np.float32)


class FakeRunner:
    """A network of one matrix on pooled pixels; `change` alters its logits."""

    target = "fake"
    inputs = (TensorSpec("pixels", "float32", ("batch", 3, "height", "width")),)
    outputs = (TensorSpec("logits", "float32", ("batch", 10)),)

    def __init__(self, change=lambda logits, pixels: logits):
        self.change = change
        self.images_seen = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, pixels):
        self.images_seen += len(pixels)
        b, _, h, w = pixels.shape
        pooled = pixels.reshape(b, 3, 2, h // 2, 2, w // 2).mean(axis=(3, 5)).reshape(b, -1)
        return {"logits": self.change(pooled @ WEIGHTS, pixels), "tap": pooled}

    def bind(self, pixels):
        return lambda: self.run(pixels)


def batches(count=22, turn=(1, 2, 8), sizes=((8, 8),), labels=False):
    random = np.random.Generator(np.random.PCG64(1))
    for size in sizes:
        for part in batch_sizes_in_turn(count, turn):
            pixels = random.normal(0, 1, (len(part), 3, *size)).astype(np.float32)
            names = tuple(f"{k}.jpg" for k in part)
            yield Batch(pixels, names, tuple(k % 10 for k in part) if labels else None)


def test_an_equal_candidate_passes():
    found = validate(FakeRunner(), FakeRunner(), batches(), BARS["fp32"])
    assert found.passed and found.failures == ()
    assert found.images == 22
    assert found.agreement.top1_agreement == 1


def test_a_candidate_slightly_off_passes_bf16_but_not_fp32():
    off = FakeRunner(lambda logits, _: logits * np.float32(1.003))
    assert validate(FakeRunner(), off, batches(), BARS["bf16"]).passed
    found = validate(FakeRunner(), off, batches(), BARS["fp32"])
    assert not found.passed
    assert "max |delta|" in found.failures[0]


@pytest.mark.parametrize("precision", BARS)
def test_one_nan_in_one_image_fails(precision):
    def poison(logits, pixels):
        logits = logits.copy()
        if len(pixels) == 8:
            logits[5, 4] = np.nan
        return logits

    found = validate(FakeRunner(), FakeRunner(poison), batches(), BARS[precision])
    assert not found.passed
    assert found.to_json()["passed"] is False


def test_an_untrue_result_in_one_batch_size_is_seen_there():
    off = FakeRunner(lambda logits, pixels: logits + np.float32(0.5 * (len(pixels) == 2)))
    found = validate(FakeRunner(), off, batches(), BARS["fp32"])
    assert not found.passed
    assert found.by_batch[2].max_abs_difference == pytest.approx(0.5, abs=1e-4)
    assert found.by_batch[1].max_abs_difference == found.by_batch[8].max_abs_difference == 0


def test_a_group_too_small_to_move_the_mean_still_fails():
    # 1 image in 401 is wrong: the mean cosine stays above int8's bar.
    off = FakeRunner(lambda logits, pixels: -logits if len(pixels) == 1 else logits)
    found = validate(FakeRunner(), off, batches(401, (8,)), BARS["int8"])
    assert found.agreement.centred_cosine > 0.995
    assert found.failures[0].startswith("batches of 1: mean centred cosine is -1")


def test_image_sizes_are_told_apart_and_images_counted_once():
    off = FakeRunner(lambda logits, pixels: logits + np.float32(pixels.shape[3] == 12))
    found = validate(FakeRunner(), off, batches(5, (2,), ((8, 8), (8, 12))), BARS["fp32"])
    assert found.images == 5 and found.agreement.images == 10
    assert found.by_size[(8, 8)].max_abs_difference == 0
    assert found.by_size[(8, 12)].max_abs_difference == pytest.approx(1, abs=1e-4)


def test_accuracy_counts_every_image_once_at_the_first_size():
    found = validate(
        FakeRunner(), FakeRunner(), batches(9, (4,), ((8, 8), (8, 12)), labels=True), BARS["fp32"]
    )
    assert found.accuracy is not None and found.accuracy.images == 9
    assert found.accuracy.top1.p_value == 1


def test_without_labels_there_is_no_accuracy():
    found = validate(FakeRunner(), FakeRunner(), batches(3), BARS["fp32"])
    assert found.accuracy is None
    assert found.to_json()["accuracy"] is None


def test_the_reference_runs_once_an_image():
    reference = FakeRunner()
    validate(reference, FakeRunner(), batches(23), BARS["fp32"])
    assert reference.images_seen == 23


def test_progress_is_told_the_images_of_each_batch():
    told: list[int] = []
    validate(FakeRunner(), FakeRunner(), batches(14), BARS["fp32"], told.append)
    assert told == [1, 2, 8, 1, 2]


def test_no_images_is_a_usage_error():
    with pytest.raises(UsageError, match="no images"):
        validate(FakeRunner(), FakeRunner(), [], BARS["fp32"])


def test_a_candidate_of_other_classes_is_refused():
    narrow = FakeRunner(lambda logits, _: logits[:, :9])
    with pytest.raises(RunnerError, match=r"got \[1, 9\], expected \[1, 10\]"):
        validate(FakeRunner(), narrow, batches(), BARS["fp32"])


def test_json_is_flat_with_breakdowns():
    found = validate(FakeRunner(), FakeRunner(), batches(labels=True), BARS["fp32"])
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["images"] == 22
    assert document["max_abs_difference"] == 0
    assert document["top1_agreement"] == 1
    assert document["passed"] is True and document["failures"] == []
    assert [row["batch"] for row in document["by_batch"]] == [1, 2, 8]
    assert [row["size"] for row in document["by_size"]] == ["8x8"]
    assert document["accuracy"]["images"] == 22
    assert document["bar"]["max_abs_difference"] == 1e-4


@pytest.mark.parametrize(
    ("count", "sizes", "expected"),
    [
        (22, (1, 2, 8), [1, 2, 8, 1, 2, 8]),
        (14, (1, 2, 8), [1, 2, 8, 1, 2]),
        (6, (1, 2, 8), [1, 2, 1, 2]),
        (20, (8,), [8, 8, 4]),
        (11, (8, 3), [8, 3]),
        (3, (8,), [3]),
        (0, (1, 2), []),
    ],
)
def test_batches_take_their_sizes_in_turn(count, sizes, expected):
    parts = list(batch_sizes_in_turn(count, sizes))
    assert [len(part) for part in parts] == expected
    assert [k for part in parts for k in part] == list(range(count))


@pytest.mark.parametrize("sizes", [(), (0,), (1, -2)])
def test_impossible_batch_sizes_are_usage_errors(sizes):
    with pytest.raises(UsageError, match="batch sizes"):
        batch_sizes_in_turn(4, sizes)
