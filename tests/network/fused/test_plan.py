import pytest

from coat_deploy.network.fused import plan
from coat_deploy.network.variants import VARIANTS

HEADS = sorted({c // v.num_heads for v in VARIANTS.values() for c in v.channels})


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kinds", [[8], [2, 3, 3]])
def test_every_group_fits_its_lanes_wherever_it_begins(head, kinds) -> None:
    together = plan.heads_together(head, kinds)
    lanes = plan.lanes(together, head)
    assert plan.LEAST_LANES <= lanes <= plan.MOST_LANES
    assert lanes & (lanes - 1) == 0
    for first in range(8):
        start = first * head
        assert start + together * head - start // plan.ALIGNED * plan.ALIGNED <= lanes


@pytest.mark.parametrize(
    ("head", "kinds", "together", "lanes"),
    [
        (8, [8], 8, 64),  # a scale of 64 channels is one group
        (8, [2, 3, 3], 2, 16),
        (19, [2, 3, 3], 3, 64),
        (64, [2, 3, 3], 1, 64),
    ],
)
def test_groups_waste_the_fewest_lanes(head, kinds, together, lanes) -> None:
    assert plan.heads_together(head, kinds) == together
    assert plan.lanes(together, head) == lanes


def test_windows_are_counted_by_kind() -> None:
    assert plan.window_kinds([3, 3, 5, 5, 5, 7, 7, 7]) == [(3, 2), (5, 3), (7, 3)]
    assert plan.window_kinds([7] * 8) == [(7, 8)]
    assert plan.num_groups(2, [2, 3, 3]) == 5
