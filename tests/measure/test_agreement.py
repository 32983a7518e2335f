import dataclasses
import json
import math

import numpy as np
import pytest

from coat_deploy.errors import RunnerError, UsageError
from coat_deploy.measure.agreement import Agreement, AgreementMeter
from coat_deploy.measure.bar import BARS, Bar, get_bar

RANDOM = np.random.Generator(np.random.PCG64(7))
LOGITS = RANDOM.normal(0, 3, (6, 12)).astype(np.float32)


def agreement(reference, candidate, output="logits", batch=4):
    meter = AgreementMeter()
    r, c = (np.asarray(x, dtype=np.float32) for x in (reference, candidate))
    for start in range(0, len(r), batch):
        part = slice(start, start + batch)
        meter.add({output: r[part]}, {output: c[part]})
    return meter.agreement()


def test_equal_logits_agree_perfectly():
    found = agreement(LOGITS, LOGITS)
    assert found.images == 6
    assert found.max_abs_difference == found.mean_abs_difference == found.relative_l2 == 0
    assert found.centred_cosine_min == pytest.approx(1, abs=1e-15)
    assert found.kl_divergence == found.kl_divergence_max == 0
    assert found.top1_agreement == found.top5_overlap == 1
    assert found.flip_margins == ()


def test_figures_equal_a_hand_worked_case():
    found = agreement([[1.0, 2.0, 3.0, 0, 0, 0]], [[1.5, 2.0, 3.0, 0, 0, 0]])
    assert found.max_abs_difference == 0.5
    assert found.mean_abs_difference == pytest.approx(0.5 / 6)
    assert found.relative_l2 == pytest.approx(0.5 / math.sqrt(14))
    # Centred: r = (0, 1, 2, -1, -1, -1), |r|^2 = 8; c = d - 1/12 with d = r + 0.5 e1.
    # r.c = 8 - 0 = 8; |c|^2 = 8.25 - 6 / 144.
    assert found.centred_cosine == pytest.approx(8 / math.sqrt(8 * (8.25 - 6 / 144)))


def test_kl_divergence_is_of_the_reference_from_the_candidate():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    found = agreement(np.log(p)[None], np.log(q)[None])
    assert found.kl_divergence == pytest.approx(0.25 * math.log(2), rel=1e-6)


def test_kl_divergence_of_huge_logits_is_finite():
    found = agreement([[1e4, 0, -1e4]], [[0, 1e4, -1e4]])
    assert found.kl_divergence == pytest.approx(1e4)


def test_an_offset_common_to_all_logits_does_not_flatter_the_cosine():
    candidate = RANDOM.normal(0, 3, LOGITS.shape).astype(np.float32)
    plain = agreement(LOGITS, candidate).centred_cosine
    assert agreement(LOGITS + 1000, candidate + 1000).centred_cosine == pytest.approx(
        plain, abs=1e-4
    )


@pytest.mark.parametrize(
    ("reference", "candidate", "cosine"),
    [([[0.1] * 7], [[0.3] * 7], 1.0), ([[0.1] * 7], [[1, 2, 3, 4, 5, 6, 7]], 0.0)],
)
def test_cosine_of_constant_logits_is_defined(reference, candidate, cosine):
    assert agreement(reference, candidate).centred_cosine == cosine


def test_relative_l2_against_nothing_is_zero_or_infinite():
    assert agreement([[0.0, 0.0]], [[0.0, 0.0]]).relative_l2 == 0
    assert agreement([[0.0, 0.0]], [[0.0, 1e-9]]).relative_l2 == math.inf


def test_top1_and_top5_count_changed_classes():
    reference = np.arange(8, 0, -1, dtype=np.float32)[None].repeat(2, axis=0)
    candidate = reference.copy()
    candidate[0, [0, 5]] = candidate[0, [5, 0]]  # the first class falls to sixth
    found = agreement(reference, candidate)
    assert found.top1_agreement == 0.5
    assert found.top5_overlap == pytest.approx((0.8 + 1) / 2)
    assert found.flip_margins == (1.0,)


def test_batching_does_not_change_the_figures():
    candidate = LOGITS + RANDOM.normal(0, 0.1, LOGITS.shape).astype(np.float32)
    assert agreement(LOGITS, candidate, batch=1) == agreement(LOGITS, candidate, batch=6)


def test_worst_image_is_named():
    candidate = LOGITS.copy()
    candidate[4, 2] += 0.5
    meter = AgreementMeter()
    meter.add({"logits": LOGITS[:3]}, {"logits": candidate[:3]}, ["a", "b", "c"])
    meter.add({"logits": LOGITS[3:]}, {"logits": candidate[3:]}, ["d", "e", "f"])
    found = meter.agreement()
    assert (found.worst_image, found.worst_index) == ("e", 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
@pytest.mark.parametrize("bar", [Bar(), *BARS.values()], ids=["empty", *BARS])
def test_no_bar_lets_a_value_that_is_not_finite_pass(value, side, bar):
    broken = LOGITS.copy()
    broken[2, 3] = value
    reference = LOGITS if side == "candidate" else broken
    candidate = LOGITS if side == "reference" else broken
    found = agreement(reference, candidate)
    assert bar.failures(found)
    assert found.top1_agreement == pytest.approx(5 / 6)
    assert found.worst_index == 2
    assert found.to_json()["non_finite"] == {
        "reference": int(side != "candidate"),
        "candidate": int(side != "reference"),
    }


@pytest.mark.parametrize("precision", BARS)
def test_a_figure_that_is_nan_fails_its_limit(precision):
    sound = agreement(LOGITS, LOGITS)
    broken = dataclasses.replace(
        sound, max_scaled_difference=math.nan, centred_cosine=math.nan, relative_l2=math.nan
    )
    assert not BARS[precision].failures(sound)
    assert BARS[precision].failures(broken)


def test_feature_maps_have_no_class_figures():
    maps = RANDOM.normal(0, 2, (3, 4, 5, 6)).astype(np.float32)
    found = agreement(maps, maps + np.float32(1e-6), output="x1")
    assert found.top1_agreement is None
    assert found.kl_divergence is None
    assert found.to_json()["top5_overlap"] is None
    assert not BARS["fp32"].failures(found)


def test_of_several_outputs_the_worst_counts():
    maps = {f"x{k}": RANDOM.normal(0, 2, (2, 3, k, k)).astype(np.float32) for k in (1, 2, 3)}
    other = {name: value.copy() for name, value in maps.items()}
    other["x2"][1] *= -1
    meter = AgreementMeter()
    meter.add(maps, other, ["a", "b"])
    alone = AgreementMeter()
    alone.add({"x2": maps["x2"]}, {"x2": other["x2"]}, ["a", "b"])
    assert meter.agreement() == alone.agreement()
    assert meter.agreement().centred_cosine_min == pytest.approx(-1)
    assert meter.agreement().worst_image == "b"


def test_a_bar_of_class_limits_alone_does_not_pass_feature_maps():
    maps = RANDOM.normal(0, 2, (2, 3, 2, 2)).astype(np.float32)
    (failure,) = Bar(min_top1_agreement=0.9).failures(agreement(maps, maps, output="x1"))
    assert "feature maps" in failure


def test_the_absolute_limit_grows_with_outputs_above_full_scale():
    large = LOGITS / np.abs(LOGITS).max() * 2000
    found = agreement(large, large + np.float32(1e-3))
    assert found.max_abs_difference > 5e-4
    assert not BARS["fp32"].failures(found)
    small = agreement(large / 200, large / 200 + np.float32(1e-3))
    assert any("max |delta|" in failure for failure in BARS["fp32"].failures(small))


def test_small_logits_are_held_to_a_relative_limit():
    (failure,) = BARS["fp32"].failures(agreement(LOGITS / 1e4, LOGITS / 1e4 * 1.01))
    assert failure == "relative L2 is 0.01, above 0.0001."


def test_a_near_tie_that_flips_is_excused_and_reported():
    reference = np.array([[1.0, 1.00005, 0, 0, 0, 0]])
    found = agreement(reference, reference[:, [1, 0, 2, 3, 4, 5]])
    assert found.top1_agreement == 0
    assert BARS["fp32"].excused(found) == 1
    assert not BARS["fp32"].failures(found)


def test_a_clear_flip_is_not_excused():
    reference = np.array([[1.0, 1.001, 0, 0, 0, 0]])
    found = agreement(reference, reference[:, [1, 0, 2, 3, 4, 5]])
    failures = BARS["fp32"].override(max_abs_difference=None, max_relative_l2=None).failures(found)
    assert failures == (
        "top-1 agreement is 0.00%, below 100.00% (1 of 1 images differ, 0 of them near ties).",
    )


def test_failures_tell_the_value_the_limit_and_the_image():
    found = agreement(LOGITS, LOGITS + np.eye(6, 12, dtype=np.float32)[::-1] * 0.01)
    failures = Bar(max_abs_difference=1e-3, min_centred_cosine=0.9999999).failures(found)
    assert failures[0].startswith("max |delta| is 0.01, above 0.001, worst in ")
    assert failures[1].startswith("mean centred cosine is 0.99999")


def test_int8_bar_separates_a_good_from_a_careless_quantization():
    many = RANDOM.normal(0, 3, (100, 1000)).astype(np.float32)
    noise = RANDOM.normal(0, 3, many.shape).astype(np.float32)
    bar = BARS["int8"].override(min_top1_agreement=None)
    assert not bar.failures(agreement(many, many + 0.07 * noise))
    assert bar.failures(agreement(many, many + 1.0 * noise))


def test_missing_output_is_named():
    with pytest.raises(RunnerError, match=r"output 'logits'.*got x1"):
        AgreementMeter().add({"logits": LOGITS}, {"x1": LOGITS})


def test_another_shape_tells_both_shapes():
    with pytest.raises(RunnerError, match=r"got \[6, 11\], expected \[6, 12\]"):
        AgreementMeter().add({"logits": LOGITS}, {"logits": LOGITS[:, 1:]})


def test_one_class_agrees_with_itself():
    found = agreement([[3.0], [4.0]], [[3.5], [4.0]])
    assert found.top1_agreement == found.top5_overlap == found.centred_cosine == 1


def test_json_holds_the_stable_keys_and_no_nan():
    broken = LOGITS.copy()
    broken[0, 0] = math.nan
    document = agreement(LOGITS, broken).to_json()
    text = json.dumps(document, allow_nan=False)
    assert set(json.loads(text)) == {
        "images", "max_abs_difference", "max_scaled_difference", "mean_abs_difference",
        "relative_l2", "centred_cosine", "centred_cosine_min", "kl_divergence",
        "kl_divergence_max", "top1_agreement", "top1_flips", "top5_overlap", "non_finite",
        "worst_image",
    }  # fmt: skip
    assert document["max_abs_difference"] is None


def test_override_replaces_and_removes_limits():
    bar = BARS["fp32"].override(max_abs_difference=1e-3, min_top1_agreement=None)
    assert bar.max_abs_difference == 1e-3
    assert bar.min_top1_agreement is None
    assert bar.max_relative_l2 == BARS["fp32"].max_relative_l2


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_abs_diference": 1.0}, "Did you mean 'max_abs_difference'"),
        ({"min_top1_agreement": 97.0}, "expected 0 to 1"),
        ({"max_abs_difference": math.nan}, "got nan"),
        ({"max_kl_divergence": -1.0}, "expected 0 or more"),
    ],
)
def test_impossible_limits_are_usage_errors(limits, message):
    with pytest.raises(UsageError, match=message):
        BARS["fp32"].override(**limits)


def test_unknown_precision_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'fp16'"):
        get_bar("fp61")


def test_few_images_are_judged_by_differences_not_by_shares():
    few = BARS["bf16"].for_few_images()
    assert few.min_top1_agreement is None
    assert few.min_centred_cosine == pytest.approx(0.996)
    assert BARS["fp32"].for_few_images().max_abs_difference == 1e-4


def test_summary_tells_the_main_figures():
    found: Agreement = agreement(LOGITS, LOGITS)
    assert found.summary() == (
        "max |delta| 0, relative L2 0, centred cosine 1.000000, top-1 agreement 100.00%"
    )
