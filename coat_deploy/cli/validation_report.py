"""What `validate` found, as text: passed or not and why, then the figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coat_deploy.cli.tables import format_share, render_table
from coat_deploy.spec import format_size

if TYPE_CHECKING:
    from coat_deploy.measure.accuracy import Accuracy
    from coat_deploy.measure.by_block import BlockReport
    from coat_deploy.measure.validate import Validation


def render(
    subject: str,
    validation: "Validation",
    failures: Sequence[str],
    blocks: "BlockReport | None",
) -> str:
    """Return the report; `failures` are the validation's and those found before it."""
    count = f"{validation.images} image{'' if validation.images == 1 else 's'}"
    if failures:
        verdict = f"FAILED: {subject} against PyTorch on {count}.\n"
        verdict += "".join(f"  - {failure}\n" for failure in failures)
    else:
        verdict = f"PASSED: {subject} agrees with PyTorch on {count}.\n"
    if blocks and blocks.departure:
        verdict += f"First block that departs: {blocks.departure.reason}\n"
    elif blocks:
        verdict += "Block by block, none departs by more than rounding explains.\n"
    parts = [verdict, _figures(validation), _groups(validation)]
    if validation.accuracy:
        parts.append(_accuracy(validation.accuracy))
    if blocks:
        parts.append(_blocks(blocks))
    return "\n".join(parts)


def _figures(validation: "Validation") -> str:
    agreement, bar = validation.agreement, validation.bar
    excused = bar.excused(agreement)
    top1 = format_share(agreement.top1_agreement)
    if excused:
        top1 = f"{top1} ({excused} near tie{'' if excused == 1 else 's'} apart)"
    bad = agreement.non_finite_reference + agreement.non_finite_candidate
    rows: list[tuple[str, object, object]] = [
        ("max |delta|", agreement.max_abs_difference, _limit("<=", bar.max_abs_difference)),
        ("mean |delta|", agreement.mean_abs_difference, ""),
        ("relative L2", agreement.relative_l2, _limit("<=", bar.max_relative_l2)),
        ("centred cosine", _cosine(agreement.centred_cosine), _limit(">=", bar.min_centred_cosine)),
        ("NaN or infinite", bad, "none"),
    ]
    if top1 is not None:
        rows += [
            ("KL divergence", agreement.kl_divergence, _limit("<=", bar.max_kl_divergence)),
            ("top-1 agreement", top1, _share_limit(bar.min_top1_agreement)),
            (
                "top-5 overlap",
                format_share(agreement.top5_overlap),
                _share_limit(bar.min_top5_overlap),
            ),
        ]
    return render_table(("", "found", "bar"), rows)


def _limit(sign: str, value: float | None) -> str:
    return "" if value is None else f"{sign} {value:g}"


def _share_limit(value: float | None) -> str:
    return "" if value is None else f">= {value:.0%}" if value * 100 % 1 == 0 else f">= {value:.2%}"


def _cosine(value: float) -> str:
    """Return a cosine with what tells it from 1."""
    return f"{value:.6f}" if value < 0.9999995 else "1"


def _groups(validation: "Validation") -> str:
    groups = [(f"batch {n}", a) for n, a in sorted(validation.by_batch.items())]
    groups += [(f"size {format_size(s)}", a) for s, a in validation.by_size.items()]
    return render_table(
        ("", "images", "max |delta|", "relative L2", "top-1 agreement"),
        [
            (
                name,
                a.images,
                a.max_abs_difference,
                a.relative_l2,
                format_share(a.top1_agreement),
            )
            for name, a in groups
        ],
    )


def _accuracy(accuracy: "Accuracy") -> str:
    rows = [
        (top, runner, f"{share.value:.2%}", f"{share.low:.2%} to {share.high:.2%}")
        for top, paired in (("top-1", accuracy.top1), ("top-5", accuracy.top5))
        for runner, share in (("PyTorch", paired.reference), ("artifact", paired.candidate))
    ]
    text = render_table(("accuracy", "of", "share", "95% interval"), rows)
    top1 = accuracy.top1
    if top1.reference_only == top1.candidate_only == 0:
        return f"{text}Both have the same images right.\n"
    verdict = "may be chance" if top1.is_noise else "is more than chance"
    return (
        f"{text}The difference in top-1 {verdict}: PyTorch alone is right {top1.reference_only} "
        f"times,\nthe artifact alone {top1.candidate_only} times "
        f"(McNemar's test, p = {top1.p_value:.3g}).\n"
    )


def _blocks(blocks: "BlockReport") -> str:
    departed = blocks.departure.difference.block if blocks.departure else None
    return render_table(
        ("block", "max |delta|", "relative L2", ""),
        [
            (
                b.block,
                b.max_abs_difference,
                b.relative_l2,
                "<- departs" if b.block == departed else "",
            )
            for b in blocks.blocks
        ],
    )
