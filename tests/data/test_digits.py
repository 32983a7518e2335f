"""The built-in digits, held against scikit-learn."""

import sys

import numpy as np
import pytest

from coat_deploy.data.digits import load_digits, open_digits
from coat_deploy.errors import BackendMissing

sklearn = pytest.importorskip("sklearn.datasets")


def test_pixels_are_scikit_learns_scaled_to_white():
    digits, original = load_digits(), sklearn.load_digits()
    assert len(digits) == 1797
    for i in (0, 1, 1796):
        image = digits.image(i)
        assert (image.mode, image.size) == ("RGB", (8, 8))
        pixels = np.asarray(image)
        assert (pixels == pixels[..., :1]).all()
        np.testing.assert_allclose(pixels[..., 0] / 255 * 16, original.images[i], atol=16 / 510)
    assert (np.array(digits.label_names, dtype=int)[digits.labels] == original.target).all()


def test_darkest_and_brightest_are_black_and_white():
    pixels = load_digits().pixels
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_a_fifth_of_each_digit_is_held_back():
    train, validation = open_digits()
    assert len(train) + len(validation) == 1797
    counts = np.bincount(load_digits().labels)
    assert np.bincount(validation.labels).tolist() == [round(0.2 * int(n)) for n in counts]


def test_no_digit_is_in_both_parts():
    train, validation = open_digits()
    names = [{part.name(i) for i in range(len(part))} for part in (train, validation)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 1797


def test_without_scikit_learn_the_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BackendMissing, match=r'pip install "coat-deploy\[train\]"'):
        open_digits()
