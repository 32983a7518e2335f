import dataclasses

import pytest

from coat_deploy.machine import describe
from coat_deploy.measure.choice import Choice, decide
from coat_deploy.measure.latency import ColdWarm, Latency

NAMES = ("fp32", "bf16", "int8")
AGREEMENTS = {
    "fp32": {"max_abs_difference": 1e-6, "centred_cosine": 1.0, "top1_agreement": 1.0},
    "bf16": {"max_abs_difference": 0.03, "centred_cosine": 0.9999, "top1_agreement": None},
    "int8": {"max_abs_difference": 0.3, "centred_cosine": 0.997, "top1_agreement": 0.98},
}


def latency(name: str, ratio: float, low: float, high: float) -> Latency:
    return Latency(
        name=name, target="x", precision=name, form="authored", batch=1, size=(8, 12),
        threads=None, sha256=None, p50_ms=10 / ratio, p90_ms=20.0, p99_ms=30.0,
        median_interval_ms=(9 / ratio, 11 / ratio), images_per_second=1.0, ratio=ratio,
        ratio_interval=(low, high), baseline="fp32", load_ms=ColdWarm(1, 1),
        first_run_ms=ColdWarm(1, 1), file_evicted=None, peak_memory_mib=None,
        peak_memory_source=None, memory_before_load_mib=None, iterations=1, rounds=6,
        stopped="stable",
    )  # fmt: skip


def considered(*ratios: tuple[float, float, float], ruled_out: dict[str, str] | None = None):
    """A verdict on each precision; the first is the exact one, `ratios` are of the others."""
    ruled_out = ruled_out or {}
    passed = [name for name in NAMES if name not in ruled_out]
    values = [(1.0, 1.0, 1.0), *ratios]
    latencies = {name: latency(name, *value) for name, value in zip(passed, values, strict=False)}
    agreements = {name: AGREEMENTS[name] for name in passed}
    return decide(NAMES, agreements, ruled_out, latencies, 1.05)


def verdicts(found) -> dict[str, str]:
    return {one.precision: one.verdict for one in found}


def test_the_fastest_beyond_doubt_is_chosen():
    found = considered((2.0, 1.9, 2.1), (1.5, 1.4, 1.6))
    assert verdicts(found) == {"fp32": "not chosen", "bf16": "chosen", "int8": "not chosen"}
    assert [one.reason for one in found] == [
        "slower than bf16",
        "the fastest that passes: 2.00x as fast as fp32 (95% interval 1.90 to 2.10)",
        "1.50x as fast as fp32 (95% interval 1.40 to 1.60), slower than bf16",
    ]


@pytest.mark.parametrize(
    "ratio", [(1.06, 1.04, 1.08), (1.05, 1.05, 1.05), (3.0, 0.9, 9.0), (0.5, 0.4, 0.6)]
)
def test_what_might_be_noise_or_is_slower_leaves_the_most_exact(ratio):
    found = considered(ratio, ruled_out={"int8": "no"})
    assert verdicts(found) == {"fp32": "chosen", "bf16": "not chosen", "int8": "ruled out"}
    assert found[0].reason == "the most exact that passes; none is faster beyond doubt (by 1.05x)"
    assert found[1].reason.endswith("not beyond doubt above 1.05x")


def test_a_faster_median_that_is_in_doubt_gives_way_to_one_that_is_not():
    found = considered((1.5, 1.4, 1.6), (2.0, 0.9, 3.0))
    assert verdicts(found)["bf16"] == "chosen"


def test_the_first_that_passes_is_the_one_to_beat():
    found = considered((1.01, 1.0, 1.02), ruled_out={"fp32": "its logits are NaN"})
    assert verdicts(found) == {"fp32": "ruled out", "bf16": "chosen", "int8": "not chosen"}
    assert (found[0].reason, found[0].agreement) == ("its logits are NaN", {})


def test_one_that_passes_alone_needs_no_measuring():
    found = decide(NAMES, {"bf16": AGREEMENTS["bf16"]}, {"fp32": "no", "int8": "no"}, {}, 1.05)
    assert verdicts(found)["bf16"] == "chosen"
    assert (found[1].reason, found[1].latency) == ("the only one that passes", None)


def test_a_choice_tells_figures_and_reasons():
    found = considered((2.0, 1.9, 2.1), ruled_out={"int8": "below its bar"})
    document = Choice(found, 1.05, 1, (8, 12), None, describe()).to_json()
    assert (document["precision"], document["why"]) == ("bf16", found[1].reason)
    assert (document["margin"], document["size"]) == (1.05, [8, 12])
    assert document["considered"][1] == {
        "precision": "bf16",
        "verdict": "chosen",
        "reason": found[1].reason,
        **AGREEMENTS["bf16"],
        "p50_ms": 5.0,
        "median_interval_ms": [4.5, 5.5],
        "ratio": 2.0,
        "ratio_interval": [1.9, 2.1],
    }
    assert set(document["considered"][2].values()) == {
        "int8", "ruled out", "below its bar", None
    }  # fmt: skip


def test_the_slower_end_of_the_interval_counts_not_the_ratio():
    found = considered((1.2, 1.05, 1.3), ruled_out={"int8": "no"})
    nearly = dataclasses.replace(found[1].latency, ratio_interval=(1.051, 1.3))
    again = decide(
        NAMES[:2], dict(list(AGREEMENTS.items())[:2]), {}, {
            "fp32": found[0].latency, "bf16": nearly
        }, 1.05,
    )  # fmt: skip
    assert (verdicts(found)["bf16"], verdicts(again)["bf16"]) == ("not chosen", "chosen")
