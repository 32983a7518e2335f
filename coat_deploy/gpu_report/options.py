"""What a report is of, and how long it may take."""

from dataclasses import dataclass

from coat_deploy.errors import UsageError, unknown_name

PUBLISHED = (
    "coat_lite_tiny", "coat_lite_mini", "coat_lite_small", "coat_tiny", "coat_mini", "coat_small",
    "coat_lite_medium", "coat_lite_medium_384",
)  # fmt: skip
"""The smallest first: what the time does not reach are the largest."""

HELP = {
    "budget": "Seconds for all of it; what does not fit is skipped, and said to be.",
    "variants": "Networks whose numbers are checked, separated by commas, or none. "
    "Default: the published.",
    "ways": "Ways to check and time, separated by commas, as the report calls them, with their "
    "precision or for all of them. Default: all.",
    "bench": "Networks that are timed, separated by commas.",
    "batch": "Batch sizes, separated by commas, the most wanted first.",
    "device": "cuda, or cpu: a dry run of whatever runs there, whose times mean nothing.",
    "record": "Append the report to a file, as a JSON line.",
    "markdown": "Write its tables to a file.",
    "json": "Print the report as one JSON object on stdout.",
}
"""What the options are for, however they are read."""


@dataclass(frozen=True)
class ReportOptions:
    """What to report.

    budget_s: seconds for everything. variants: networks whose numbers are checked. bench: networks
    that are timed, with `batches`. ways: by name, with or without their precision; none: all that
    there are. seconds: of timing, a way and batch.

    Raises: UsageError for values that cannot be.
    """

    budget_s: float = 520.0
    variants: tuple[str, ...] = PUBLISHED
    bench: tuple[str, ...] = ("coat_lite_mini",)
    batches: tuple[int, ...] = (256, 1, 64, 8)
    device: str = "cuda"
    seconds: float = 2.0
    ways: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from coat_deploy.network.variants import VARIANTS  # not for --help
        from coat_deploy.runner import DEVICES

        if self.device not in DEVICES:
            raise UsageError(unknown_name("device", self.device, DEVICES))
        for name in (*self.variants, *self.bench):
            if name not in VARIANTS:
                raise UsageError(unknown_name("variant", name, VARIANTS))
        if not self.budget_s > 0 or not self.seconds > 0:
            raise UsageError(f"budget: must be above 0 (got {self.budget_s:g} s).")
        if not self.variants and not self.bench:
            raise UsageError("variants and bench: both name no network, so there is nothing to do.")
        if not self.batches or min(self.batches) < 1:
            raise UsageError("batch: nothing given, or below 1. Write 1,8,64,256.")

    def wants(self, way: str, precision: str) -> bool:
        """Return whether a way, by its name with the precision, is among those asked for."""
        return not self.ways or any(self.is_called(name, way, precision) for name in self.ways)

    @staticmethod
    def is_called(name: str, way: str, precision: str) -> bool:
        """Return whether `name` means a way, with or without its precision."""
        return name in (way, way.removesuffix(f" {precision}"))


def parse_variants(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the networks that are named: of no word the published, of "none" none."""
    return () if words == ("none",) else words or PUBLISHED
