"""Hold a candidate against a reference on real images, over batch sizes and image sizes."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coat_deploy.errors import UsageError
from coat_deploy.measure.accuracy import Accuracy, AccuracyMeter
from coat_deploy.measure.agreement import Agreement, AgreementMeter
from coat_deploy.measure.bar import Bar
from coat_deploy.runner import LOGITS, Array, Pixels, Runner
from coat_deploy.spec import Size, format_size

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Images of one size: pixels (B, 3, H, W) normalised, a name each, and labels if known."""

    pixels: Pixels
    names: tuple[str, ...]
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.pixels.ndim == 4 and len(self.pixels) == len(self.names) > 0
        assert self.labels is None or len(self.labels) == len(self.names)

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return (self.pixels.shape[2], self.pixels.shape[3])


@dataclass(frozen=True)
class Validation:
    """What `validate` found.

    `by_batch` and `by_size` hold the agreement of the images that ran in a batch of that size and
    at that (height, width). `accuracy` is of the labelled images at the first size, each counted
    once. `failures` are sentences; without any the candidate passed the `bar`.
    """

    agreement: Agreement
    by_batch: Mapping[int, Agreement]
    by_size: Mapping[Size, Agreement]
    accuracy: Accuracy | None
    bar: Bar
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit of the bar is kept."""
        return not self.failures

    @property
    def images(self) -> int:
        """Distinct images; `agreement.images` counts an image once for every size."""
        return max(agreement.images for agreement in self.by_size.values())

    def to_json(self) -> dict[str, Any]:
        """Return the report: overall figures at the top, then the bar and the breakdowns."""
        return {
            **self.agreement.to_json(),
            "images": self.images,
            "comparisons": self.agreement.images,
            "top1_flips_excused": self.bar.excused(self.agreement),
            "passed": self.passed,
            "failures": list(self.failures),
            "bar": self.bar.to_json(),
            "by_batch": [
                {"batch": batch, **agreement.to_json()}
                for batch, agreement in sorted(self.by_batch.items())
            ],
            "by_size": [
                {"size": format_size(size), **agreement.to_json()}
                for size, agreement in self.by_size.items()
            ],
            "accuracy": self.accuracy.to_json() if self.accuracy else None,
        }


class _Meters:
    """Everything that is accumulated over the batches."""

    def __init__(self) -> None:
        self.overall = AgreementMeter()
        self.by_batch: defaultdict[int, AgreementMeter] = defaultdict(AgreementMeter)
        self.by_size: defaultdict[Size, AgreementMeter] = defaultdict(AgreementMeter)
        self.accuracy = AccuracyMeter()

    def add(
        self, batch: Batch, reference: Mapping[str, Array], candidate: Mapping[str, Array]
    ) -> None:
        for meter in (
            self.overall, self.by_batch[len(batch.names)], self.by_size[batch.size],
        ):  # fmt: skip
            meter.add(reference, candidate, batch.names)
        # The same photograph at a second size is no second witness: it would only narrow the
        # intervals, so accuracy is taken at the first size alone.
        first = next(iter(self.by_size))
        if batch.labels is not None and batch.size == first and LOGITS in reference:
            self.accuracy.add(reference[LOGITS], candidate[LOGITS], batch.labels)

    def validation(self, bar: Bar) -> Validation:
        overall = self.overall.agreement()
        by_batch = {size: meter.agreement() for size, meter in self.by_batch.items()}
        by_size = {size: meter.agreement() for size, meter in self.by_size.items()}
        groups = {f"batches of {n}": agreement for n, agreement in by_batch.items()}
        groups |= {f"size {format_size(s)}": agreement for s, agreement in by_size.items()}
        failures = bar.failures(overall) or _group_failures(bar, groups)
        return Validation(overall, by_batch, by_size, self.accuracy.accuracy(), bar, failures)


def _group_failures(bar: Bar, groups: Mapping[str, Agreement]) -> tuple[str, ...]:
    """Return what a mean over all images would hide: one batch size or image size gone wrong."""
    few = bar.for_few_images()
    return tuple(
        f"{group}: {failure}"
        for group, agreement in groups.items()
        for failure in few.failures(agreement)
    )


def validate(
    reference: Runner,
    candidate: Runner,
    batches: Iterable[Batch],
    bar: Bar,
    progress: Callable[[int], None] | None = None,
) -> Validation:
    """Run every batch through both runners and hold their outputs against `bar`.

    Batches are taken one at a time, so they may be decoded as they come. `progress` is called
    after each with the number of images in it. Both runners see the same pixels in the same
    batch.
    Raises: UsageError when there is no image; RunnerError when a runner fails, or the candidate
    returns other outputs or shapes than the reference.
    """
    meters = _Meters()
    wanted = tuple(spec.name for spec in reference.outputs)
    for batch in batches:
        expected = reference.run(batch.pixels)
        found = candidate.run(batch.pixels)
        meters.add(batch, {name: expected[name] for name in wanted}, found)
        if progress:
            progress(len(batch.names))
    if meters.overall.images == 0:
        raise UsageError(
            "validate: no images to compare (got 0, expected 1 or more). "
            "Give a folder that holds photographs."
        )
    validation = meters.validation(bar)
    _log.info("%d images: %s", validation.images, validation.agreement.summary())
    return validation


def batch_sizes_in_turn(count: int, sizes: Sequence[int]) -> Iterator[range]:
    """Cut images 0..count-1 into batches of the given sizes in turn: 1, 2, 8, 1, 2, 8, ...

    One pass then covers every batch size while the reference sees each image once. A size that no
    longer fits is passed over, so that the tail too has sizes that were asked for; only when none
    fits is the last batch smaller than all of them.
    Raises: UsageError when a size is below 1, or there is none.
    """
    if not sizes or min(sizes) < 1:
        raise UsageError(
            f"batch sizes {list(sizes)}: cannot be (expected one or more, each at least 1)."
        )
    return _cut(count, tuple(sizes))


def _cut(count: int, sizes: tuple[int, ...]) -> Iterator[range]:
    start = turn = 0
    while start < count:
        left = count - start
        in_turn = ((turn + k) % len(sizes) for k in range(len(sizes)))
        chosen = next((place for place in in_turn if sizes[place] <= left), None)
        size = left if chosen is None else sizes[chosen]
        yield range(start, start + size)
        start, turn = start + size, turn + 1 if chosen is None else chosen + 1
