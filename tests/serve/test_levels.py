from types import SimpleNamespace

import numpy as np
import pytest

from coat_deploy.model import ArtifactQuery, Model
from coat_deploy.open import find_source
from coat_deploy.serve import levels
from coat_deploy.serve.levels import Level, Levels, load_levels, stream_counts
from coat_deploy.serve.options import ServeOptions


class Closable:
    inputs = outputs = ()

    def __init__(self):
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


@pytest.mark.parametrize(
    ("threads", "counts"), [(1, [1]), (2, [1, 2]), (4, [1, 4]), (8, [1, 2, 8]), (12, [1, 3, 12])]
)
def test_threads_are_divided_evenly(threads, counts):
    assert stream_counts(threads) == counts


def test_the_runner_is_that_of_the_requests_at_work():
    runners = [Closable() for _ in range(3)]
    ladder = Levels([Level(n, r) for n, r in zip((1, 4, 16), runners, strict=True)], 1)
    found = {n: runners.index(ladder.runner(n)) for n in (1, 2, 4, 5, 16, 99)}
    assert found == {1: 0, 2: 1, 4: 1, 5: 2, 16: 2, 99: 2}
    assert ladder.streams == 16
    ladder.close()
    assert all(runner.closed for runner in runners)


class Counting(Closable):
    def __init__(self):
        super().__init__()
        self.batches = []

    def run(self, pixels):
        self.batches.append(len(pixels))


def test_the_first_calls_take_every_batch_that_others_are_filled_up_to():
    runner = Counting()
    Levels([Level(1, runner)], 4, [1, 2, 4]).warm_up(np.zeros((1, 3, 32, 32), np.float32), 2)
    assert runner.batches == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("most", "batches"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_those_batches_are_doubled_but_for_an_engine(most, batches):
    graph, engine = (
        SimpleNamespace(artifact=SimpleNamespace(engine=how)) for how in (None, "an engine")
    )
    assert levels._first(graph, most) == batches
    assert levels._first(engine, most) == [1]


def source_of(folder):
    return find_source(Model(folder / "coat_toy"), ArtifactQuery("onnxruntime"))


def test_a_cpu_takes_images_one_by_one(exported):
    with load_levels(source_of(exported), ServeOptions(threads=2)) as found:
        assert (found.batch, found.streams) == (1, 2)


def test_an_engine_takes_them_in_batches(exported, monkeypatch):
    monkeypatch.setattr(levels, "computes_batches", lambda target, device: True)
    with load_levels(source_of(exported), ServeOptions(threads=2, batch=4)) as found:
        assert (found.batch, found.streams) == (4, 1)
