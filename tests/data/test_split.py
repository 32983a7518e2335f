"""Holding back a part of a dataset."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from coat_deploy.data.split import Subset, hold_back, pick_part, stratified_split
from coat_deploy.errors import UsageError


class Counted:
    """Images whose brightness is their index."""

    label_names = ("a", "b", "c")

    def __init__(self, *labels: int) -> None:
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (4, 4), (index, index, index))


LABELS = np.random.default_rng(0).permutation([0] * 30 + [1] * 14 + [2] * 2 + [5] * 1)


def test_every_image_is_in_one_part_in_its_old_order():
    kept, held = stratified_split(LABELS, 0.25, seed=3)
    assert sorted([*kept, *held]) == list(range(len(LABELS)))
    assert (np.diff(kept) > 0).all() and (np.diff(held) > 0).all()


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.1, {0: 3, 1: 1, 2: 1}), (0.25, {0: 8, 1: 4, 2: 1}), (0.95, {0: 28, 1: 13, 2: 1})],
)
def test_each_class_gives_its_rounded_share_at_least_one_and_never_all(share, expected):
    _, held = stratified_split(LABELS, share, seed=0)
    assert Counter(LABELS[held].tolist()) == expected


def shuffled(seed: int, rank: int, count: int) -> list[int]:
    """The permutation from the standard library's Mersenne Twister, whose numbers are fixed too."""
    twister = random.Random(seed + (rank << 32))
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        mask = (1 << last.bit_length()) - 1
        while (drawn := twister.getrandbits(32) & mask) > last:
            pass
        order[last], order[drawn] = order[drawn], order[last]
    return order


def test_split_is_the_same_on_every_machine():
    _, held = stratified_split(np.array([0] * 10 + [1] * 10), 0.3, seed=7)
    assert held.tolist() == [0, 1, 5, 15, 18, 19]
    assert sorted(10 + i for i in shuffled(7, 1, 10)[:3]) == [15, 18, 19]


def test_another_seed_gives_another_split():
    splits = {tuple(stratified_split(LABELS, 0.3, seed)[1]) for seed in range(5)}
    assert len(splits) == 5


def test_new_images_of_one_class_leave_the_others_where_they_were():
    before = np.array([0] * 20 + [1] * 20)
    after = np.array([0] * 20 + [1] * 27)
    first, second = (stratified_split(labels, 0.2, seed=1)[1] for labels in (before, after))
    assert first[first < 20].tolist() == second[second < 20].tolist()


def test_other_numbers_for_the_same_classes_change_nothing():
    renumbered = np.select([LABELS == 0, LABELS == 1, LABELS == 2], [10, 20, 30], 40)
    assert (stratified_split(LABELS, 0.2, 0)[1] == stratified_split(renumbered, 0.2, 0)[1]).all()


def test_subset_shows_the_images_of_the_whole_under_their_names():
    subset = Subset(Counted(0, 1, 2, 0, 1), np.array([4, 0]))
    assert len(subset) == 2
    assert subset.label_names == ("a", "b", "c")
    assert subset.labels.tolist() == [1, 0]
    assert [subset.name(i) for i in range(2)] == ["image 4", "image 0"]
    assert subset.image(0).getpixel((0, 0)) == (4, 4, 4)


def test_class_with_one_image_cannot_be_split():
    with pytest.raises(UsageError, match=r"^data: class 'b' has one image, .* at least 2"):
        hold_back(Counted(0, 0, 1, 2, 2), 0.1, 0, "data")


def test_parts_go_by_the_names_of_splits():
    parts = hold_back(Counted(0, 0, 1, 1, 2, 2), 0.5, 0, "data")
    assert pick_part(parts, "train", "data") is parts[0]
    assert pick_part(parts, "validation", "data") is pick_part(parts, None, "data") is parts[1]
    with pytest.raises(UsageError, match=r"data: unknown split 'trian' .*Did you mean 'train'"):
        pick_part(parts, "trian", "data")
