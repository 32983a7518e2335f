from types import SimpleNamespace

import pytest
import torch

from coat_deploy.train.checkpoint import load_checkpoint
from coat_deploy.train.processes import open_processes
from coat_deploy.train.state import load_weights, read_weights, same_everywhere


@pytest.fixture
def accelerator(toys):
    return open_processes(toys.recipe(), "cpu")


@pytest.fixture(scope="module")
def alone(toys, scenarios, tmp_path_factory):
    """The course of one process, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("alone")
    return scenarios.course(open_processes(toys.recipe(), "cpu"), "plain", folder), folder


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def assert_close(found, expected):
    """Leaves out biases of K: a softmax ignores them, and Adam makes steps of rounding errors."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith("qkv.bias"):
            continue
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("variant", ["coat_lite_toy", "coat_toy"])
def test_weights_go_there_and_back(toys, variant):
    first, second = toys.network(variant), toys.network(variant, seed=1)
    load_weights(second, read_weights(first))
    assert_same(second.state_dict(), first.state_dict())


def test_weights_that_were_read_stay_as_they_were(toys):
    network = toys.network()
    read = read_weights(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert_same(read, before)


def test_a_resumed_course_ends_with_the_bits_of_one_that_was_not_interrupted(
    accelerator, scenarios, alone
):
    whole, folder = alone
    rest = scenarios.resumed(accelerator, "plain", folder)
    assert rest["losses"] == whole["losses"][scenarios.SAVED_AT :]
    assert_same(rest["weights"], whole["weights"])
    assert_same(rest["average"], whole["average"])


def test_a_checkpoint_is_of_its_moment_and_not_of_later_steps(accelerator, scenarios, tmp_path):
    run = scenarios.Course(accelerator)
    run.step(0)
    checkpoint = run.checkpoint()
    checkpoint.save(tmp_path)
    run.step(1)
    saved = load_checkpoint(tmp_path)
    assert_same(checkpoint.network, saved.network)
    assert_same(checkpoint.average, saved.average)
    for i, values in saved.optimiser["state"].items():
        assert_same(checkpoint.optimiser["state"][i], values)


def test_a_checkpoint_of_no_step_can_be_loaded(accelerator, scenarios, tmp_path):
    first, second = scenarios.Course(accelerator), scenarios.Course(accelerator, seed=1)
    first.checkpoint().save(tmp_path)
    second.load(load_checkpoint(tmp_path))
    first.step(0)
    second.step(0)
    assert_same(read_weights(second.network), read_weights(first.network))


def test_the_state_of_a_gradient_scaler_goes_along(accelerator, scenarios, tmp_path):
    """A scaler works on a CPU, too; Accelerate makes one where fp16 is fast."""
    first, second = scenarios.Course(accelerator), scenarios.Course(accelerator, seed=1)
    before = torch.amp.GradScaler("cpu", init_scale=64.0)
    before.scale(torch.ones(()))
    before.update(1024.0)
    after = torch.amp.GradScaler("cpu")
    first.accelerator = SimpleNamespace(scaler=before)
    first.checkpoint().save(tmp_path)
    second.accelerator = SimpleNamespace(scaler=after)
    second.load(load_checkpoint(tmp_path))
    assert after.state_dict() == before.state_dict()
    assert after.get_scale() == 1024.0


def test_without_an_average_a_checkpoint_has_none(toys, accelerator, scenarios, tmp_path):
    first, second = scenarios.Course(accelerator), scenarios.Course(accelerator, seed=1)
    for run in (first, second):
        run.average = type(run.average)(run.network, 0.0)
    first.step(0)
    first.checkpoint().save(tmp_path)
    second.load(load_checkpoint(tmp_path))
    assert load_checkpoint(tmp_path).average == {}
    assert_same(read_weights(second.network), read_weights(first.network))


def test_one_process_answers_for_itself(accelerator):
    assert same_everywhere(accelerator, True, False) == [True, False]


def test_of_several_processes_any_may_say_yes(two_processes):
    found, _, _ = two_processes
    assert [rank["asked"] for rank in found] == 2 * [[True, True, False, True]]


@pytest.mark.parametrize("how", ["copied", "sharded"])
def test_two_processes_run_the_course_of_one(two_processes, alone, how):
    """Losses, weights, averages, and what the averaged network says between the steps."""
    (found, _), _, _ = two_processes
    expected, _ = alone
    assert found[how]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    torch.testing.assert_close(found[how]["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    assert_close(found[how]["weights"], expected["weights"])
    assert_close(found[how]["average"], expected["average"])


@pytest.mark.parametrize("how", ["copied", "sharded"])
def test_two_processes_resume_to_the_bit(two_processes, scenarios, how):
    for found in two_processes[0]:
        whole, rest = found[how], found[f"{how}, resumed"]
        assert rest["losses"] == whole["losses"][scenarios.SAVED_AT :]
        assert_same(rest["weights"], whole["weights"])
        assert_same(rest["average"], whole["average"])


@pytest.mark.parametrize("how", ["copied", "sharded"])
def test_one_process_goes_on_from_the_checkpoint_of_two(
    two_processes, alone, scenarios, accelerator, how
):
    _, folder, _ = two_processes
    keys = list(scenarios.Course(accelerator).network.state_dict())
    assert sorted(load_checkpoint(folder / how).network) == sorted(keys)
    rest = scenarios.resumed(accelerator, "plain", folder / how)
    assert_close(rest["weights"], alone[0]["weights"])


def test_weights_of_a_sharded_network_are_whole_in_every_process(toys, two_processes):
    found, _, _ = two_processes
    expected = toys.network("coat_toy").state_dict()
    for rank in found:
        assert_same(rank["weights"]["read"], expected)


def test_a_sharded_network_computes_with_the_weights_it_was_given(toys, two_processes):
    (found, _), _, _ = two_processes
    assert_same(found["weights"]["loaded"], found["weights"]["read"])
    with torch.no_grad():
        expected = toys.network("coat_toy").eval()(torch.ones(1, 3, toys.SIDE, toys.SIDE))
    # The average of the network that was loaded into is still that of its own beginning.
    with torch.no_grad():
        average = toys.network("coat_toy", seed=1).eval()(torch.ones(1, 3, toys.SIDE, toys.SIDE))
    torch.testing.assert_close(found["weights"]["logits"], average, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, average, atol=1e-2)
