import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coat_deploy.train.mixing import Mixing, smooth_labels, soft_cross_entropy
from coat_deploy.train.recipe import Recipe

CLASSES = 5
LABELS = torch.tensor([0, 3, 4, 1, 1, 2])


def mixing(**changes):
    return Mixing(Recipe().replace(changes), CLASSES)


def numbered(*size, count=6):
    """Images of one value each: the n-th of n."""
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, *size).clone()


def mix(seed, images, labels=LABELS, **changes):
    torch.manual_seed(seed)
    return mixing(**changes)(images, labels)


def kept_by_mixup(mixed):
    """The first image is 0 and its partner 5."""
    return 1 - mixed[0].mean().item() / 5


def kept_by_cutmix(mixed):
    return (mixed[0, 0] == 0).double().mean().item()


@pytest.mark.parametrize("seed", range(4))
def test_mixup_mixes_images_and_targets_as_timm(timm, seed, monkeypatch):
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = kept_by_mixup(mix(seed, numbered(2, 2), cutmix=0.0)[0])
    monkeypatch.setattr(np.random, "beta", lambda *_: kept)
    reference = timm.data.Mixup(0.8, 0.0, label_smoothing=0.1, num_classes=CLASSES)
    expected = reference(images.clone(), LABELS)
    for ours, theirs in zip(mix(seed, images, cutmix=0.0), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("seed", range(4))
def test_cutmix_targets_are_those_of_timm_for_the_pixels_pasted(timm, seed):
    mixed, targets = mix(seed, numbered(16, 24), mixup=0.0)
    kept = kept_by_cutmix(mixed)
    expected = timm.data.mixup.mixup_target(LABELS, CLASSES, kept, 0.1)
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize(("done", "mixed"), [(0.0, True), (0.79, True), (0.8, False), (1.0, False)])
def test_nothing_is_mixed_after_the_share_of_the_training_asked_for(done, mixed):
    images = numbered(16, 24)
    torch.manual_seed(0)
    got, targets = mixing(mix_until=0.8)(images.clone(), LABELS, done)
    assert torch.equal(got, images) is not mixed
    assert torch.equal(targets, smooth_labels(LABELS, CLASSES, 0.1)) is not mixed


def test_cutmix_pastes_the_same_rectangle_of_each_images_partner():
    images = numbered(16, 24)
    mixed, _ = mix(3, images.clone(), mixup=0.0)
    pasted = mixed[:, :1] != images[:, :1]
    assert 0 < pasted[0].sum() < 16 * 24
    assert torch.equal(pasted[0], pasted[5]) and torch.equal(pasted[0], pasted[2])
    rows, columns = pasted[0, 0].any(1), pasted[0, 0].any(0)
    assert torch.equal(pasted[0, 0], rows[:, None] & columns)
    assert torch.equal(mixed, torch.where(pasted, images.flip(0), images))


def test_pasted_shares_are_distributed_as_those_of_timm(timm):
    box = timm.data.mixup.cutmix_bbox_and_lam
    numpy_draws = np.random.default_rng(0)
    theirs = [box((6, 3, 16, 24), numpy_draws.beta(1, 1))[1] for _ in range(2000)]
    one = mixing(mixup=0.0)
    torch.manual_seed(0)
    ours = [
        kept_by_cutmix(one(numbered(16, 24, count=2), torch.tensor([0, 1]))[0]) for _ in range(2000)
    ]
    evenly = np.linspace(0, 1, 11)[1:-1]
    np.testing.assert_allclose(np.quantile(ours, evenly), np.quantile(theirs, evenly), atol=0.06)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_mixups_shares_have_the_moments_of_the_beta_distribution(alpha):
    one = mixing(mixup=alpha, cutmix=0.0)
    torch.manual_seed(1)
    kept = [kept_by_mixup(one(numbered(1, 1), LABELS)[0]) for _ in range(3000)]
    assert np.mean(kept) == pytest.approx(0.5, abs=0.02)
    assert np.std(kept) == pytest.approx(math.sqrt(1 / (4 * (2 * alpha + 1))), rel=0.04)


def test_a_share_of_the_batches_is_mixed_half_of_them_each_way():
    one = mixing(mix_share=0.6)
    torch.manual_seed(0)
    mixed = [one(numbered(8, 8), LABELS)[0] for _ in range(2000)]
    plain = np.mean([torch.equal(images, numbered(8, 8)) for images in mixed])
    mixed_up = np.mean([bool((images[0] % 1).any()) for images in mixed])
    assert plain == pytest.approx(0.4, abs=0.04)  # CutMix pastes now and then nothing
    assert mixed_up == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    "changes", [{"mix_share": 0.0}, {"mixup": 0.0, "cutmix": 0.0}], ids=["no share", "no alpha"]
)
def test_unmixed_targets_are_torchs_label_smoothing(changes):
    images, logits = numbered(4, 4), torch.randn(6, CLASSES)
    same, targets = mix(0, images.clone(), label_smoothing=0.13, **changes)
    assert torch.equal(same, images)
    expected = F.cross_entropy(logits, LABELS, label_smoothing=0.13)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), expected)


def test_without_smoothing_targets_are_the_labels():
    assert torch.equal(smooth_labels(LABELS, CLASSES, 0.0), F.one_hot(LABELS, CLASSES).float())


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_targets_of_any_batch_sum_to_one(count):
    for seed in range(8):
        _, targets = mix(seed, numbered(6, 6, count=count), LABELS[:count])
        assert targets.dtype == torch.float32 and targets.min() > 0
        torch.testing.assert_close(targets.sum(1), torch.ones(count))


def test_an_image_alone_mixes_with_itself():
    images = torch.rand(1, 3, 6, 6)
    for seed in range(4):
        mixed, targets = mix(seed, images.clone(), LABELS[:1])
        torch.testing.assert_close(mixed, images)
        torch.testing.assert_close(targets, smooth_labels(LABELS[:1], CLASSES, 0.1))


def test_images_stay_channels_last():
    for changes in ({"mixup": 0.0}, {"cutmix": 0.0}):
        images = numbered(8, 8).contiguous(memory_format=torch.channels_last)
        mixed, _ = mix(0, images, **changes)
        assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_the_seed_decides_how_a_batch_is_mixed():
    first, second, other = (mix(seed, numbered(8, 8))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_computed_in_float32_whatever_the_logits(precision):
    logits = (torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0)) * 9).to(precision)
    targets = smooth_labels(LABELS, CLASSES, 0.1).lerp(torch.full((6, CLASSES), 0.2), 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    by_hand = logits.double()
    by_hand = by_hand - by_hand.exp().sum(1, keepdim=True).log()
    expected = -(targets.double() * by_hand).sum(1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
