import numpy as np
import pytest

from coat_deploy.network.variants import get_variant
from coat_deploy.study.cells import Cell
from coat_deploy.study.cost import Cost
from coat_deploy.study.tables import ablation_rows

SHARES = {"without": (0.50, 0.54, 0.52), "with": (0.60, 0.61, 0.68)}


@pytest.fixture
def rows():
    variant = get_variant("coat_lite_toy")
    cells = [Cell("part", name, variant) for name in SHARES]
    costs = [Cost(name, (64, 64), 1, 2, 3.0, None, None, None) for name in SHARES]
    results = [
        {"group": "part", "cell": name, "seed": seed, "top1": share, "images": 341}
        for name, shares in SHARES.items()
        for seed, share in reversed(list(enumerate(shares)))
    ]
    return ablation_rows(cells, results, costs)


def test_mean_and_deviation_are_over_seeds(rows):
    for row in rows:
        assert row.top1 == SHARES[row.name]
        assert row.mean == pytest.approx(np.mean(SHARES[row.name]))
        assert row.deviation == pytest.approx(np.std(SHARES[row.name], ddof=1))


def test_difference_is_paired_by_seed(rows):
    paired = np.subtract(SHARES["with"], SHARES["without"])
    assert rows[1].difference == pytest.approx(paired.mean())
    assert rows[1].difference_error == pytest.approx(paired.std(ddof=1) / np.sqrt(3))
    assert (rows[0].difference, rows[0].difference_error) == (0, 0)


def test_one_seed_has_no_deviation():
    cell = Cell("part", "only", get_variant("coat_lite_toy"))
    cost = Cost("only", (64, 64), 1, 2, 3.0, None, None, None)
    result = {"group": "part", "cell": "only", "seed": 0, "top1": 0.5, "images": 10}
    (row,) = ablation_rows([cell], [result], [cost])
    assert (row.deviation, row.difference_error) == (None, None)
