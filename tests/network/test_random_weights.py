import hashlib

import numpy as np
import pytest

from coat_deploy.network.random_weights import random_tensors

torch = pytest.importorskip("torch")

from coat_deploy.network.coat import create_network  # noqa: E402
from coat_deploy.network.keys import expected_shapes, shared_parameters  # noqa: E402
from coat_deploy.spec import ModelSpec, Preprocess  # noqa: E402


def draw(name, seed=0):
    spec = ModelSpec(name, 1000, 0, Preprocess((224, 224)))
    return random_tensors(expected_shapes(spec), shared_parameters(spec), seed)


def logits(name, pixels):
    network = create_network(name).eval()
    network.load_state_dict({key: torch.from_numpy(value) for key, value in draw(name).items()})
    with torch.no_grad():
        return network(pixels).numpy()


def pictures(side=64):
    """Eight smooth fields of colour, as unlike each other as photographs."""
    coarse = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")


def test_the_bits_are_the_same_on_every_machine():
    tensors = random_tensors({"a.weight": (5, 7), "norm1.weight": (11,)}, (), 3)
    digest = hashlib.sha256(b"".join(value.tobytes() for value in tensors.values()))
    assert digest.hexdigest() == "207b08028adb8c0a9a0110b9d02abb46a95751f202c63cd9e2271b492e018e01"


def test_a_key_does_not_depend_on_the_others():
    alone = random_tensors({"b.weight": (4, 4)}, (), 0)
    among = random_tensors({"a.weight": (9,), "b.weight": (4, 4)}, (), 0)
    assert np.array_equal(alone["b.weight"], among["b.weight"])


def test_seeds_and_keys_draw_different_values():
    shapes = {"a.weight": (64, 64), "b.weight": (64, 64)}
    first, second = random_tensors(shapes, (), 0), random_tensors(shapes, (), 1)
    assert abs(np.corrcoef(first["a.weight"].ravel(), first["b.weight"].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(first["a.weight"].ravel(), second["a.weight"].ravel())[0, 1]) < 0.05


def test_matrices_have_the_variance_of_their_fan_in():
    weight = random_tensors({"a.weight": (400, 256)}, (), 0)["a.weight"]
    assert weight.dtype == np.float32
    assert abs(weight.mean()) < 1e-3
    assert weight.std() * 16 == pytest.approx(1, rel=0.01)


def test_shared_keys_hold_what_the_first_of_them_draws():
    shapes = {"b.weight": (4, 4), "a.weight": (4, 4)}
    tensors = random_tensors(shapes, [("a.weight", "b.weight")], 0)
    assert list(tensors) == ["b.weight", "a.weight"]
    alone = random_tensors({"a.weight": (4, 4)}, (), 0)
    assert np.array_equal(tensors["a.weight"], alone["a.weight"])
    assert np.array_equal(tensors["b.weight"], alone["a.weight"])


@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy"])
def test_no_parameter_is_left_at_zero(name):
    for key, value in draw(name).items():
        assert np.isfinite(value).all(), key
        assert (value != 0).mean() > 0.999, key


@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy", "coat_lite_tiny", "coat_tiny"])
def test_logits_have_the_spread_of_a_trained_network_and_follow_the_image(name):
    out = logits(name, pictures())
    assert 1 < out.std() < 3
    assert out.std(axis=0).mean() > 0.3
    top = np.sort(out, axis=1)
    assert np.median(top[:, -1] - top[:, -2]) > 0.01


@pytest.mark.slow
def test_activations_stay_of_order_one_in_the_deepest_network():
    out = logits("coat_lite_medium", pictures()[:2])
    assert 1 < out.std() < 3
