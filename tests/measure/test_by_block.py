import json
import math

import numpy as np
import pytest

from coat_deploy.errors import RunnerError
from coat_deploy.measure.by_block import (
    BLOCK_LIMITS,
    BlockDifference,
    compare_blocks,
    first_departure,
)
from coat_deploy.runner import TensorSpec

FP32 = BLOCK_LIMITS["fp32"]
PIXELS = np.zeros((2, 3, 4, 4), dtype=np.float32)
TAPS = (
    "patch_embed1.image",
    "serial_blocks1.0.image",
    "serial_blocks1.0.cls",
    "parallel_blocks.0.image2",
    "parallel_blocks.0.image3",
    "parallel_blocks.0.cls4",
)


class TappedRunner:
    """Returns fixed tensors, whatever the pixels."""

    target = "fake"
    inputs = (TensorSpec("pixels", "float32", ("batch", 3, 4, 4)),)
    outputs = (TensorSpec("logits", "float32", ("batch", 5)),)

    def __init__(self, tensors):
        self.tensors = tensors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, pixels):
        return self.tensors

    def bind(self, pixels):
        return lambda: self.tensors


def tensors():
    random = np.random.Generator(np.random.PCG64(5))
    made = {tap: random.normal(0, 1, (2, 7, 6)).astype(np.float32) for tap in TAPS}
    made["logits"] = random.normal(0, 1, (2, 5)).astype(np.float32)
    return made


def compare(reference, candidate):
    return compare_blocks(TappedRunner(reference), TappedRunner(candidate), TAPS, PIXELS, FP32)


def profile(errors):
    return [BlockDifference(f"block.{k}", f"block.{k}.image", e, e) for k, e in enumerate(errors)]


def departing(errors, precision="fp32"):
    found = first_departure(profile(errors), BLOCK_LIMITS[precision])
    return found and int(found.difference.block.removeprefix("block."))


# Measured on coat_lite_small and coat_tiny, an embedding first.
FP32_ROUNDING = [1.3e-7, 4.2e-7, 4.8e-7, 5.6e-7, 6.6e-7, 6.5e-7, 5.7e-7, 4e-7, 5.5e-7, 8.2e-7]
BF16_ROUNDING = [3.2e-3, 5.2e-3, 5.7e-3, 7.9e-3, 8.8e-3, 1.1e-2, 5.7e-3, 9.7e-3, 1.0e-2]


def test_rounding_alone_accuses_no_block():
    assert departing(FP32_ROUNDING) is None
    assert departing(BF16_ROUNDING, "bf16") is None


def test_rounding_that_grows_by_halves_accuses_no_block():
    assert departing([3e-7 * 1.5**k for k in range(12)]) is None


@pytest.mark.parametrize("place", range(len(FP32_ROUNDING)))
def test_one_changed_weight_accuses_its_block(place):
    # As measured for one weight moved by 0.05: a jump to 2e-4 that decays afterwards.
    errors = FP32_ROUNDING[:place] + [1.9e-4 * 0.8**k for k in range(len(FP32_ROUNDING) - place)]
    assert departing(errors) == place


def test_a_jump_below_the_ceiling_accuses_its_block():
    assert departing([3e-7, 4e-7, 9e-6, 8e-5]) == 2


def test_a_change_amplified_later_accuses_where_the_jump_is():
    assert departing([3e-7, 4e-7, 2e-5, 5e-4, 1e-1]) == 2


def test_error_that_creeps_over_the_ceiling_is_told():
    assert departing([3e-7 * 4**k for k in range(8)]) == 5


def test_a_change_of_a_tenth_accuses_its_block_in_bf16():
    assert departing([*BF16_ROUNDING[:4], 0.1, 0.08], "bf16") == 4


def test_equal_runners_depart_nowhere():
    report = compare(tensors(), tensors())
    assert report.departure is None
    assert [b.block for b in report.blocks] == [
        "patch_embed1", "serial_blocks1.0", "parallel_blocks.0", "logits",
    ]  # fmt: skip


def test_the_scales_of_a_parallel_block_are_one_block_and_the_worst_is_named():
    changed = tensors()
    changed["parallel_blocks.0.image3"] = changed["parallel_blocks.0.image3"] * np.float32(1.01)
    report = compare(tensors(), changed)
    assert report.departure is not None
    assert report.departure.difference.block == "parallel_blocks.0"
    assert report.departure.difference.tensor == "parallel_blocks.0.image3"
    assert report.departure.difference.relative_l2 == pytest.approx(0.01, rel=1e-4)
    assert "parallel_blocks.0: relative error 0.01" in report.departure.reason


def test_a_change_behind_the_last_block_names_the_output():
    changed = tensors()
    changed["logits"] = changed["logits"] + np.float32(0.1)
    report = compare(tensors(), changed)
    assert report.departure is not None
    assert report.departure.difference.block == "logits"
    assert report.departure.difference.max_abs_difference == pytest.approx(0.1, rel=1e-5)


def test_shapes_may_differ_where_elements_do_not():
    flat = {name: value.reshape(-1, value.shape[-1]) for name, value in tensors().items()}
    assert compare(tensors(), flat).departure is None


@pytest.mark.parametrize("side", ["reference", "candidate"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_departs_at_once(side, value):
    broken = tensors()
    broken["serial_blocks1.0.cls"][1, 0, 3] = value
    pair = (broken, tensors()) if side == "reference" else (tensors(), broken)
    report = compare(*pair)
    assert report.departure is not None
    assert report.departure.difference.block == "serial_blocks1.0"
    assert "1 values of serial_blocks1.0.cls are NaN or infinite" in report.departure.reason
    json.dumps(report.to_json(), allow_nan=False)


def test_output_where_the_reference_is_zero_departs():
    zero = tensors()
    zero["patch_embed1.image"] = np.zeros_like(zero["patch_embed1.image"])
    report = compare(zero, tensors())
    assert report.departure is not None
    assert report.departure.difference.block == "patch_embed1"


def test_a_tensor_that_is_not_returned_is_named():
    lacking = tensors()
    del lacking["serial_blocks1.0.cls"]
    with pytest.raises(RunnerError, match="'serial_blocks1.0.cls': the candidate does not"):
        compare(tensors(), lacking)


def test_another_number_of_elements_is_refused():
    short = tensors()
    short["patch_embed1.image"] = short["patch_embed1.image"][:, 1:]
    with pytest.raises(RunnerError, match=r"got \[2, 6, 6\], expected \[2, 7, 6\]"):
        compare(tensors(), short)


def test_json_names_the_first_departing_block():
    changed = tensors()
    changed["serial_blocks1.0.image"] = changed["serial_blocks1.0.image"] + np.float32(1e-3)
    document = json.loads(json.dumps(compare(tensors(), changed).to_json(), allow_nan=False))
    assert document["first_departing"] == "serial_blocks1.0"
    assert document["departure"]["tensor"] == "serial_blocks1.0.image"
    assert len(document["blocks"]) == 4
    assert compare(tensors(), tensors()).to_json()["first_departing"] is None
