import pytest

from coat_deploy.network.variants import get_variant
from coat_deploy.study.cells import CO_SCALE, POSITIONS, all_cells, variant_cells
from coat_deploy.study.cost import count
from coat_deploy.train.recipe import Recipe


def named(group):
    return {cell.name: cell for cell in all_cells() if cell.group == group}


def test_position_cells_differ_in_their_encodings_alone():
    parameters = {
        name: {key.split(".")[0][:-1] for key in cell.network(10, Recipe()).state_dict()}
        for name, cell in named(POSITIONS).items()
    }
    both = parameters["CPE and CRPE"]
    assert parameters["CPE"] == both - {"crpe"}
    assert parameters["CRPE"] == both - {"cpe"}
    assert parameters["neither"] == both - {"cpe", "crpe"}


def test_ways_of_co_scale_have_the_same_parameters():
    cells = named(CO_SCALE)
    interpolation, *others = (
        cells[name].network(10, Recipe()).state_dict()
        for name in ("feature interpolation", "cross-layer attention", "parallel, no exchange")
    )
    for other in others:
        assert list(other) == list(interpolation)


def test_serial_network_is_about_as_large_as_the_one_with_parallel_blocks():
    cells = named(CO_SCALE)
    size = (64, 64)
    serial, _ = count(cells["serial blocks only"], 10, size)
    parallel, _ = count(cells["feature interpolation"], 10, size)
    assert serial == pytest.approx(parallel, rel=0.2)


def test_networks_of_two_seeds_differ_and_of_one_do_not():
    cell = all_cells()[0]
    weights = [
        cell.network(3, Recipe(seed=seed)).state_dict()["patch_embed1.proj.weight"]
        for seed in (1, 1, 2)
    ]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_cost_table_is_of_the_published_variants():
    names = [cell.name for cell in variant_cells()]
    assert len(names) == 8
    assert all(get_variant(name).published for name in names)
