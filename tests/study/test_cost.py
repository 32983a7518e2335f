from coat_deploy.measure.bench import BenchOptions
from coat_deploy.network.coat import create_network
from coat_deploy.network.macs import count_macs, count_parameters
from coat_deploy.network.variants import get_variant
from coat_deploy.study.cells import Cell
from coat_deploy.study.cost import measure_costs


def test_costs_are_of_the_networks_in_their_order():
    names = ("coat_lite_toy", "coat_toy")
    cells = [Cell("cost", name, get_variant(name)) for name in names]
    options = BenchOptions(budget_s=0, warmup_s=0, min_rounds=6, slice_ms=1)
    costs, machine = measure_costs(cells, 7, None, 1, options)
    assert [cost.name for cost in costs] == list(names)
    for cost in costs:
        network = create_network(cost.name, 7)
        assert cost.parameters == count_parameters(network)
        assert cost.macs == count_macs(network, (64, 64))
        assert cost.latency_ms > 0
    assert machine["threads"] >= 1
