"""scikit-learn's handwritten digits: the one data set that needs no download.

1,797 images of 8x8 grey values from 0 to 16, by 43 writers: the test part of E. Alpaydin and
C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from coat_deploy.data.dataset import Dataset
from coat_deploy.data.split import hold_back
from coat_deploy.errors import BackendMissing

NAME = "digits"
HELD_BACK, SEED = 0.2, 0
"""The split is fixed, so that accuracies can be compared."""

_WHITE = 16


@dataclass(frozen=True, eq=False)
class Digits:
    """All digits, in scikit-learn's order. pixels: (N, 8, 8) uint8, white on black."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...] = tuple("0123456789")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return "digit 0", "digit 1", ..."""
        return f"digit {index}"

    def image(self, index: int) -> Image.Image:
        """Return a digit as 8-bit RGB, 8x8."""
        return Image.fromarray(self.pixels[index]).convert("RGB")


def load_digits() -> Digits:
    """Return all digits. Raises: BackendMissing without scikit-learn."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise BackendMissing(
            f"data source {NAME}: package scikit-learn is not installed. "
            'Run: pip install "coat-deploy[train]".'
        ) from error
    digits = load()
    pixels = np.rint(digits.images * (255 / _WHITE)).astype(np.uint8)
    return Digits(pixels, digits.target.astype(np.int64))


def open_digits() -> tuple[Dataset, Dataset]:
    """Return the digits in two, a fifth of each class held back. Raises: BackendMissing."""
    return hold_back(load_digits(), HELD_BACK, SEED, NAME)
