import math

import pytest

from coat_deploy.best import fewest

BLOCKS = [f"block{i}" for i in range(20)]


@pytest.mark.parametrize(
    "needed",
    [(), (0,), (19,), (7,), (3, 4), (0, 19), (2, 9, 17), (0, 1, 2, 3), tuple(range(20))],
)
def test_just_the_blocks_that_are_needed_are_kept(needed) -> None:
    wanted, trials = {BLOCKS[i] for i in needed}, []

    def passes(keep):
        trials.append(tuple(keep))
        return wanted <= set(keep)

    assert fewest(BLOCKS, passes) == tuple(block for block in BLOCKS if block in wanted)
    assert len(trials) <= 2 + len(needed) * (2 + math.ceil(math.log2(len(BLOCKS))))


def test_of_two_blocks_of_which_one_is_enough_only_one_is_kept() -> None:
    kept = fewest(BLOCKS, lambda keep: bool({"block3", "block12"} & set(keep)))
    assert kept == ("block3",)


def test_where_all_are_not_enough_there_is_no_answer() -> None:
    assert fewest(BLOCKS, lambda keep: False) is None
