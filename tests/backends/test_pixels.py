import numpy as np
import pytest

from coat_deploy.backends.pixels import accept
from coat_deploy.errors import RunnerError
from coat_deploy.network.variants import VARIANTS
from coat_deploy.runner import TensorSpec

FIXED = TensorSpec("pixels", "float32", ("batch", 3, 64, 96))
DYNAMIC = TensorSpec("pixels", "float32", ("?", 3, "?", "?"))


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(FIXED, (1, 3, 64, 96)), (FIXED, (9, 3, 64, 96)), (DYNAMIC, (1, 3, 32, 333))],
)
def test_pixels_that_fit_are_passed_on_without_a_copy(spec, shape) -> None:
    pixels = zeros(*shape)
    assert accept(pixels, spec, "eager") is pixels


@pytest.mark.parametrize(
    ("shape", "spec", "words"),
    [
        ((2, 3, 96, 64), FIXED, ["(2, 3, 96, 64)", "(B >= 1, 3, 64, 96)"]),
        ((2, 1, 64, 96), FIXED, ["(2, 1, 64, 96)", "(B >= 1, 3, 64, 96)"]),
        ((0, 3, 64, 96), FIXED, ["(0, 3, 64, 96)", "(B >= 1, 3, 64, 96)"]),
        ((3, 64, 96), FIXED, ["(3, 64, 96)", "(B >= 1, 3, 64, 96)"]),
        ((2, 3, 32, 31), DYNAMIC, ["(2, 3, 32, 31)", "(B >= 1, 3, H >= 32, W >= 32)"]),
        ((2, 4, 64, 64), DYNAMIC, ["(2, 4, 64, 64)", "(B >= 1, 3, H >= 32, W >= 32)"]),
    ],
)
def test_another_shape_is_refused_in_one_line_with_both(shape, spec, words) -> None:
    with pytest.raises(RunnerError) as caught:
        accept(zeros(*shape), spec, "openvino")
    message = str(caught.value)
    assert message.startswith("openvino: the pixels do not fit (got float32 ")
    assert all(word in message for word in words)
    assert "\n" not in message


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int32", ">f4"])
def test_another_dtype_is_refused_with_both(dtype: str) -> None:
    with pytest.raises(RunnerError, match=rf"got {dtype} .*expected float32 .*Convert"):
        accept(zeros(2, 3, 64, 96, dtype=dtype), FIXED, "eager")


@pytest.mark.parametrize("kind", ["transposed", "reversed", "strided", "read-only"])
def test_an_array_that_runtimes_cannot_take_as_it_is_is_copied(kind: str) -> None:
    whole = np.arange(2 * 3 * 64 * 96, dtype=np.float32)
    pixels = {
        "transposed": whole.reshape(2, 3, 96, 64).swapaxes(2, 3),
        "reversed": whole.reshape(2, 3, 64, 96)[:, :, :, ::-1],
        "strided": np.repeat(whole, 2).reshape(4, 3, 64, 96)[::2],
        "read-only": whole.reshape(2, 3, 64, 96).copy(),
    }[kind]
    pixels.flags.writeable = kind != "read-only"
    got = accept(pixels, FIXED, "eager")
    assert np.array_equal(got, pixels)
    assert got.flags.c_contiguous
    assert got.flags.writeable


def test_the_minimum_holds_for_every_variant() -> None:
    assert {variant.min_side for variant in VARIANTS.values()} == {32}
