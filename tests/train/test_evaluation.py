import numpy as np
import pytest
import torch

from coat_deploy.backends.eager import EagerRunner
from coat_deploy.errors import ImageError
from coat_deploy.evaluate import evaluate
from coat_deploy.runner import LoadOptions
from coat_deploy.spec import Preprocess
from coat_deploy.train import evaluation as evaluation_module
from coat_deploy.train.evaluation import Evaluation
from coat_deploy.train.processes import open_processes

SIZES = [(40, 50), (32, 32), (70, 35), (33, 90)]
PLENTY = 1 << 30


@pytest.fixture
def accelerator(toys):
    return open_processes(toys.recipe(), "cpu")


def figures(quality, pictures):
    return quality.to_json(pictures.label_names)


def assert_equal_but_rounding(found, expected, rel=1e-5):
    """Counts are equal, sums of probabilities are of logits in other batches."""
    sums = ("nll", "mean_confidence", "calibration_error")
    assert {k: found[k] for k in sums} == pytest.approx({k: expected[k] for k in sums}, rel=rel)
    counts = [{k: v for k, v in of.items() if k not in (*sums, "calibration_bins")}
              for of in (found, expected)]  # fmt: skip
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "how",
    [
        Preprocess((32, 32)),
        Preprocess((32, 64), crop_pct=1.0),
        Preprocess((40, 40), crop_mode="border", mean=(0.5, 0.4, 0.3), interpolation="bilinear"),
    ],
)
@pytest.mark.parametrize("memory", [PLENTY, 0])
def test_it_finds_what_the_command_evaluate_finds(toys, accelerator, how, memory):
    """In the same batches: only sums are taken in another order, in float64."""
    pictures, network = toys.Pictures(17, size=SIZES), toys.network("coat_toy")
    expected = evaluate(
        EagerRunner(network.eval(), LoadOptions()), pictures, pictures.label_names, how, batch=5
    )
    found = Evaluation(pictures, how, 5, memory, True).run(network, accelerator)
    assert_equal_but_rounding(
        figures(found, pictures), figures(expected.quality, pictures), rel=1e-13
    )
    assert found.nll > 0.1  # or it would be equal by chance


@pytest.mark.parametrize("memory", [PLENTY, 0])
def test_images_lie_in_memory_as_runners_take_them(toys, accelerator, memory):
    """In another layout, convolutions of some machines round otherwise."""
    network, seen = toys.network(), []
    network.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    how = toys.spec().preprocess
    Evaluation(toys.Pictures(3), how, 2, memory, True).run(network, accelerator)
    assert [pixels.is_contiguous() for pixels in seen] == [True, True]


def test_batches_of_any_size_find_the_same(toys, accelerator):
    pictures, network = toys.Pictures(17, size=SIZES), toys.network()
    how = toys.spec().preprocess
    one, *others = (
        figures(Evaluation(pictures, how, size, PLENTY, True).run(network, accelerator), pictures)
        for size in (1, 4, 17, 100)
    )
    for other in others:
        assert_equal_but_rounding(other, one)


def test_the_network_is_in_evaluation_mode_and_then_as_it_was(toys, accelerator):
    pictures, network = toys.Pictures(6), toys.network(drop_path=0.9)
    evaluation = Evaluation(pictures, toys.spec().preprocess, 4, PLENTY, True)
    network.train()
    first, second = (figures(evaluation.run(network, accelerator), pictures) for _ in range(2))
    assert first == second
    assert network.training
    network.eval()
    evaluation.run(network, accelerator)
    assert not network.training


def test_no_gradient_is_computed_and_no_random_number_drawn(toys, accelerator):
    pictures, network = toys.Pictures(6), toys.network(drop_path=0.9)
    evaluation = Evaluation(pictures, toys.spec().preprocess, 4, PLENTY, True)
    state = torch.random.get_rng_state()
    evaluation.run(network, accelerator)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("memory", [PLENTY, 0])
def test_images_that_cannot_be_read_are_told_once_and_not_counted(
    toys, accelerator, caplog, memory
):
    pictures, network = toys.Pictures(11, broken=(2, 3, 9)), toys.network()
    evaluation = Evaluation(pictures, toys.spec().preprocess, 2, memory, True)
    first, second = (evaluation.run(network, accelerator) for _ in range(2))
    assert first.images == second.images == 8
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped: picture {i}: is broken." for i in (2, 3, 9)
    ]


def test_of_several_processes_one_tells(toys, accelerator, caplog):
    pictures = toys.Pictures(4, broken=(1,))
    how = toys.spec().preprocess
    Evaluation(pictures, how, 2, PLENTY, False).run(toys.network(), accelerator)
    assert caplog.records == []


def test_where_no_image_can_be_read_it_is_said_before_training(toys):
    with pytest.raises(ImageError, match="none of the validation images can be read"):
        Evaluation(toys.Pictures(4, broken=range(4)), toys.spec().preprocess, 2, PLENTY, True)


def test_where_no_image_can_be_read_and_none_is_held_it_is_said_at_the_first_run(toys, accelerator):
    pictures = toys.Pictures(4, broken=range(4))
    evaluation = Evaluation(pictures, toys.spec().preprocess, 2, 0, True)
    with pytest.raises(ImageError, match="none of the validation images can be read"):
        evaluation.run(toys.network(), accelerator)


def test_held_images_are_decoded_once_and_others_at_every_run(toys, accelerator):
    class Counted(toys.Pictures):
        decoded = 0

        def image(self, index):
            self.decoded += 1
            return super().image(index)

    how, network = toys.spec().preprocess, toys.network()
    need = 5 * 3 * 32 * 32
    for memory, decodings in ((need, 5), (need - 1, 10)):
        pictures = Counted(5)
        evaluation = Evaluation(pictures, how, 2, memory, True)
        for _ in range(2):
            evaluation.run(network, accelerator)
        assert pictures.decoded == decodings


def test_a_network_of_nans_is_wrong_everywhere_and_no_error(toys, accelerator):
    pictures, network = toys.Pictures(6), toys.network()
    with torch.no_grad():
        network.head.bias.fill_(float("nan"))
    found = Evaluation(pictures, toys.spec().preprocess, 4, PLENTY, True).run(network, accelerator)
    assert (found.top1.value, found.non_finite, found.nll) == (0, 6, None)


def test_figures_that_a_checkpoint_keeps_are_plain_numbers(toys, accelerator):
    """A checkpoint with numpy's would be refused when it is read."""
    evaluation = Evaluation(toys.Pictures(6), toys.spec().preprocess, 4, PLENTY, True)
    found = evaluation.run(toys.network(), accelerator)
    assert type(found.top1.value) is type(found.top5.value) is type(found.nll) is float


@pytest.mark.parametrize("name", ["held", "read anew"])
def test_two_processes_find_what_one_finds(toys, accelerator, two_processes, name):
    """Also with fewer images than whole batches for both, and one that cannot be read."""
    pictures = toys.Pictures(13, broken=(4,), size=[(40, 50), (32, 32), (70, 35)])
    evaluation = Evaluation(pictures, toys.spec().preprocess, 3, PLENTY, True)
    expected = figures(evaluation.run(toys.network(), accelerator), pictures)
    (first, second), _, _ = two_processes
    assert_equal_but_rounding(first["evaluated"][name], expected)
    assert first["evaluated"] == second["evaluated"]


def test_of_two_processes_the_first_tells_each_unreadable_image_once(two_processes):
    _, _, (first, second) = two_processes
    # In memory and anew are two evaluations.
    assert first.count("picture 4: is broken") == 2
    assert "is broken" not in second


def test_more_processes_than_images_find_what_one_finds(toys, accelerator, monkeypatch):
    """The second of three: it has no image, and runs a blank one with the others."""
    pictures, network, seen = toys.Pictures(1), toys.network(), []
    network.register_forward_hook(lambda *_: seen.append(1))
    monkeypatch.setattr(type(accelerator), "process_index", 1)
    monkeypatch.setattr(type(accelerator), "num_processes", 3)
    evaluation = Evaluation(pictures, toys.spec().preprocess, 4, PLENTY, False)
    logits = [(0, np.array([3.0, 0.0, 0.0], np.float32))]
    monkeypatch.setattr(evaluation_module, "gather_object", lambda found: [*found, *logits])
    assert evaluation.run(network, accelerator).top1.value == 1
    assert seen == [1]
