"""The eight published CoaT variants, two small ones of ours, and toys for tests.

Sizes: Tables 1 and 2 of "Co-Scale Conv-Attentional Image Transformers" (arXiv 2104.06399) and
the authors' code; accuracy: their README and timm's results tables; parameters and MACs: timm.
This file imports nothing heavy: the graphs read it without PyTorch.
"""

from dataclasses import dataclass

from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.spec import TimmForm

OFFICIAL_URL = "https://vcl.ucsd.edu/coat/pretrained/"


@dataclass(frozen=True)
class Published:
    """Figures others published for a variant; accuracies in per cent on ImageNet-1k.

    `top1`, `top5` are timm's measurements, `paper_top1`, `paper_top5` the authors'.
    `file` is the name below `OFFICIAL_URL`; it ends in the first 8 digits of its SHA-256.
    """

    params_m: float
    gmacs: float
    paper_top1: float
    paper_top5: float
    top1: float
    top5: float
    file: str

    @property
    def sha8(self) -> str:
        """First eight hexadecimal digits of the official file's SHA-256."""
        return self.file.removesuffix(".pth")[-8:]

    @property
    def url(self) -> str:
        """Address of the authors' checkpoint."""
        return OFFICIAL_URL + self.file


@dataclass(frozen=True)
class Variant:
    """Sizes of one CoaT; tuples hold one entry a scale, 1 to 4.

    `windows` maps a CRPE window size to the number of heads that use it.
    `parallel_depth` is 0 for CoaT-Lite. `input_size` is the side of the published square input.
    `counted` are the parameters in millions and the GMACs of one of ours that is for use, with
    1,000 classes as the published figures are.
    """

    name: str
    channels: tuple[int, int, int, int]
    serial_depths: tuple[int, int, int, int]
    parallel_depth: int
    ffn_ratios: tuple[int, int, int, int]
    input_size: int = 224
    num_heads: int = 8
    windows: tuple[tuple[int, int], ...] = ((3, 2), (5, 3), (7, 3))
    patch_size: int = 4
    published: Published | None = None
    counted: tuple[float, float] | None = None

    @property
    def num_features(self) -> int:
        """Channels of the vector that the classifier reads."""
        return self.channels[3]

    @property
    def timm(self) -> TimmForm | None:
        """How timm makes a variant that is not published, and so has no name there."""
        if self.published:
            return None
        args: dict[str, list[int] | int] = {
            "embed_dims": list(self.channels),
            "serial_depths": list(self.serial_depths),
            "mlp_ratios": list(self.ffn_ratios),
        }
        if self.parallel_depth:
            return TimmForm("coat_tiny", args | {"parallel_depth": self.parallel_depth})
        return TimmForm("coat_lite_tiny", args)

    @property
    def min_side(self) -> int:
        """Smallest image side that leaves one position at scale 4."""
        return self.patch_size * 8


_TABLE = (
    Variant(
        "coat_lite_tiny", (64, 128, 256, 320), (2, 2, 2, 2), 0, (8, 8, 4, 4),
        published=Published(
            5.72, 1.60, 77.5, 93.8, 77.548, 93.924, "coat_lite_tiny_e88e96b0.pth"),
    ),
    Variant(
        "coat_lite_mini", (64, 128, 320, 512), (2, 2, 2, 2), 0, (8, 8, 4, 4),
        published=Published(
            11.01, 2.00, 79.1, 94.5, 79.104, 94.606, "coat_lite_mini_6b4a8ae5.pth"),
    ),
    Variant(
        "coat_lite_small", (64, 128, 320, 512), (3, 4, 6, 3), 0, (8, 8, 4, 4),
        published=Published(
            19.84, 3.96, 81.9, 95.5, 82.304, 95.854, "coat_lite_small_8d362f48.pth"),
    ),
    Variant(
        "coat_lite_medium", (128, 256, 320, 512), (3, 6, 10, 8), 0, (4, 4, 4, 4),
        published=Published(
            44.57, 9.81, 83.6, 96.7, 83.602, 96.714, "coat_lite_medium_a750cd63.pth"),
    ),
    Variant(
        "coat_lite_medium_384", (128, 256, 320, 512), (3, 6, 10, 8), 0, (4, 4, 4, 4),
        input_size=384,
        published=Published(
            44.57, 28.73, 84.5, 97.1, 84.890, 97.376, "coat_lite_medium_384x384_f9129688.pth"),
    ),
    Variant(
        "coat_tiny", (152, 152, 152, 152), (2, 2, 2, 2), 6, (4, 4, 4, 4),
        published=Published(5.50, 4.35, 78.3, 94.0, 78.442, 94.044, "coat_tiny_c6efc33c.pth"),
    ),
    Variant(
        "coat_mini", (152, 216, 216, 216), (2, 2, 2, 2), 6, (4, 4, 4, 4),
        published=Published(10.34, 6.82, 81.0, 95.2, 81.320, 95.388, "coat_mini_40667eec.pth"),
    ),
    Variant(
        "coat_small", (152, 320, 320, 320), (2, 2, 2, 2), 6, (4, 4, 4, 4),
        published=Published(21.69, 12.61, 82.1, 96.1, 82.378, 96.214, "coat_small_7479cf9b.pth"),
    ),
    # Ours, not the paper's, and without published weights: about a million parameters, to be
    # trained from scratch on little data and few cores.
    Variant(
        "coat_lite_nano", (32, 64, 128, 160), (1, 1, 2, 1), 0, (8, 8, 4, 4),
        input_size=64, counted=(1.113, 0.0220),
    ),
    Variant(
        "coat_nano", (32, 96, 96, 96), (1, 1, 1, 1), 2, (4, 4, 4, 4),
        input_size=64, counted=(0.922, 0.0366),
    ),
    # Ours as well: every part of the network in milliseconds, for tests.
    Variant("coat_toy", (16, 24, 24, 24), (1, 1, 1, 1), 2, (2, 2, 2, 2), input_size=64),
    Variant("coat_lite_toy", (16, 24, 32, 40), (1, 2, 1, 1), 0, (2, 2, 2, 2), input_size=64),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _TABLE}


def get_variant(name: str) -> Variant:
    """Return the row of `name`. Raises UsageError with the nearest name."""
    if name not in VARIANTS:
        raise UsageError(unknown_name("architecture", name, VARIANTS))
    return VARIANTS[name]
