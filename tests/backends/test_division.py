import pytest

from coat_deploy.backends.division import division, rounds


@pytest.mark.parametrize(
    ("threads", "images", "requests"),
    [(1, 8, 1), (2, 1, 1), (2, 2, 2), (2, 3, 2), (6, 4, 3), (6, 5, 3), (16, 8, 8), (16, 99, 16)],
)
def test_threads_are_divided_evenly_among_the_images(threads, images, requests) -> None:
    assert division(threads, images) == requests


@pytest.mark.parametrize(
    ("threads", "images", "expected"),
    [
        (1, 5, [(1, 5)]),
        (2, 1, [(1, 1)]),
        (2, 8, [(2, 8)]),
        (2, 7, [(2, 6), (1, 1)]),
        (4, 7, [(4, 4), (2, 3)]),
        (6, 5, [(3, 3), (2, 2)]),
        (64, 63, [(32, 32), (16, 31)]),
    ],
)
def test_what_is_left_over_gets_the_threads_that_are_free(threads, images, expected) -> None:
    assert rounds(threads, images) == expected
