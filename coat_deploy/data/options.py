"""What can be chosen about a source of labelled images."""

from collections.abc import Collection
from dataclasses import dataclass

from coat_deploy.errors import UsageError

TRAIN_SPLIT = "train"
VALIDATION_SPLITS = ("validation", "val", "valid", "test")
"""What splits are called; of several to measure with, the first in this order is taken."""

_SEEDS = 1 << 32


@dataclass(frozen=True)
class DataOptions:
    """How a source is split and read; what a source has no use for is ignored or refused.

    validation_share: held back of each class where a source has no validation split, 0 to 1.
    seed: of that split, and of the order of a stream.
    train_split, validation_split: their names, where they are not the usual ones.
    image_column, label_column: of a table, where their types leave a choice.
    streaming: read a table in sequence as training goes on, instead of fetching it all first.
    shuffle_buffer: images, still encoded, among which a stream draws the next.
    stream_length: images in an epoch of a stream that does not tell.
    label_names: the classes, in this order, of a model that there is already; images are given
        theirs by name.

    Raises: UsageError for a share, a seed or a number that cannot be.
    """

    validation_share: float = 0.1
    seed: int = 0
    train_split: str | None = None
    validation_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    stream_length: int | None = None
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise UsageError(
                f"validation share {self.validation_share:g}: cannot be (expected more than 0 "
                "and less than 1). Give for example 0.1."
            )
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(
                f"seed {self.seed}: cannot be (expected 0 to {_SEEDS - 1}). Give another."
            )
        for name in ("shuffle_buffer", "stream_length"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise UsageError(
                    f"{name.replace('_', ' ')} {count}: cannot be (expected 1 or more)."
                )
        if self.train_split and self.train_split == self.validation_split:
            raise UsageError(
                f"split '{self.train_split}': cannot be both trained on and measured with. "
                "Name two, or leave out the second: a part of the first is then held back."
            )

    def measured(self, splits: Collection[str]) -> str | None:
        """Return which of a source's splits is measured with, if one is."""
        usual = (name for name in VALIDATION_SPLITS if name in splits and name != self.train_split)
        return self.validation_split or next(usual, None)
