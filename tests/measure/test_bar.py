"""How many images may differ under a share of them."""

import numpy as np
import pytest

from coat_deploy.measure.agreement import Agreement, AgreementMeter
from coat_deploy.measure.bar import Bar


def with_flips(images: int, flips: int) -> Agreement:
    """An agreement of `images` of which `flips` have another first class."""
    reference = np.tile(np.array([0.0, 5.0, 1.0], np.float32), (images, 1))
    candidate = reference.copy()
    candidate[:flips] = candidate[:flips, ::-1] + np.array([9.0, 0.0, 0.0], np.float32)
    meter = AgreementMeter()
    meter.add({"logits": reference}, {"logits": candidate})
    return meter.agreement()


@pytest.mark.parametrize(
    ("images", "limit", "allowed"), [(8, 0.97, 1), (8, 1.0, 0), (100, 0.97, 3), (600, 0.97, 18)]
)
def test_as_many_images_may_differ_as_the_share_leaves_rounded_up(images, limit, allowed):
    bar = Bar(min_top1_agreement=limit)
    assert not bar.failures(with_flips(images, allowed))
    assert bar.failures(with_flips(images, allowed + 1))
