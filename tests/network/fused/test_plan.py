import pytest

from coat_deploy.network.fused import plan
from coat_deploy.network.variants import VARIANTS

HEADS = sorted({c // v.num_heads for v in VARIANTS.values() for c in v.channels})


@pytest.mark.parametrize("head", HEADS)
def test_every_group_fits_its_lanes_wherever_it_begins(head) -> None:
    together = plan.heads_together(head, 8)
    lanes = plan.lanes(together, head)
    assert plan.LEAST_LANES <= lanes <= plan.MOST_LANES
    assert lanes & (lanes - 1) == 0
    for first in range(8):
        start = first * head
        assert start + together * head - start // plan.ALIGNED * plan.ALIGNED <= lanes


@pytest.mark.parametrize(
    ("head", "together", "lanes"),
    [(8, 8, 64), (16, 4, 64), (19, 3, 64), (27, 2, 64), (40, 1, 64), (64, 1, 64)],
)
def test_groups_waste_the_fewest_lanes(head, together, lanes) -> None:
    assert plan.heads_together(head, 8) == together
    assert plan.lanes(together, head) == lanes


WINDOWS = [3, 3, 5, 5, 5, 7, 7, 7]


@pytest.mark.parametrize(
    ("head", "wide", "blocks"),
    [
        (8, 16, [(3, 1), (5, 1), (7, 2)]),
        (8, 32, [(5, 1), (7, 1)]),
        (8, 64, [(7, 1)]),
        (19, 32, [(3, 1), (5, 1), (7, 3)]),  # of 38, 57 and 57 channels, the last 57 begin at 95
        (64, 64, [(3, 2), (5, 3), (7, 3)]),
    ],
)
def test_blocks_take_the_widest_window_of_their_heads(head, wide, blocks) -> None:
    assert plan.window_blocks(WINDOWS, head, wide) == blocks


def test_windows_of_one_kind_are_one_run_of_blocks() -> None:
    assert plan.window_blocks([7] * 8, 40, 32) == [(7, 10)]
    assert plan.window_blocks(WINDOWS, 1, 1) == [(3, 2), (5, 3), (7, 3)]
