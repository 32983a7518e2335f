import functools
import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from coat_deploy.backends import eager, onnxruntime
from coat_deploy.errors import CorruptArtifact, RunnerError
from coat_deploy.graph.form import GraphForm
from coat_deploy.graph.taps import block_taps
from coat_deploy.runner import LoadOptions, TensorSpec

OPTIONS = LoadOptions(threads=1)


@pytest.fixture(scope="module")
def fixed(model, tmp_path_factory) -> Path:
    return model.write_graph(tmp_path_factory.mktemp("fixed"))


@pytest.fixture(scope="module")
def dynamic(model, tmp_path_factory) -> Path:
    return model.write_graph(tmp_path_factory.mktemp("dynamic"), size=None)


@pytest.fixture(scope="module")
def int8(model, tmp_path_factory) -> Path:
    return model.write_graph(tmp_path_factory.mktemp("int8"), form=GraphForm(int8_from=0))


@pytest.fixture(scope="module")
def runner(fixed):
    with onnxruntime.load(fixed, OPTIONS) as runner:
        yield runner


def test_the_runner_computes_the_network(model, runner, pixels, distance) -> None:
    for batch in (1, 3, 8):
        x = pixels(batch)
        got = runner.run(x)
        assert list(got) == ["logits"]
        assert distance(got["logits"], model.expected(x)["logits"]) < 1e-5


def test_a_dynamic_graph_runs_at_any_size(model, dynamic, pixels, distance) -> None:
    with onnxruntime.load(dynamic, OPTIONS) as runner:
        for size in ((64, 64), (75, 50), (33, 190)):
            x = pixels(2, size)
            got = runner.run(x)["logits"]
            assert distance(got, model.expected(x)["logits"]) < 1e-5


def test_a_nano_runs_with_a_fixed_and_a_dynamic_size(nano, pixels, distance, tmp_path) -> None:
    x = pixels(3)
    for size in ((64, 64), None):
        with onnxruntime.load(nano.write_graph(tmp_path, size), OPTIONS) as runner:
            assert distance(runner.run(x)["logits"], nano.expected(x)["logits"]) < 1e-5


def test_the_runner_describes_itself(runner, dynamic) -> None:
    assert runner.target == "onnxruntime"
    assert runner.inputs == (TensorSpec("pixels", "float32", ("batch", 3, 64, 64)),)
    assert runner.outputs == (TensorSpec("logits", "float32", ("batch", 10)),)
    with onnxruntime.load(dynamic, OPTIONS) as other:
        assert other.inputs[0].shape == ("batch", 3, "height", "width")


def test_bind_gives_what_run_gives(runner, pixels) -> None:
    x = pixels(3)
    step = runner.bind(x)
    for _ in range(2):
        assert np.array_equal(step()[0], runner.run(x)["logits"])


def test_features_are_the_four_maps(model, pixels, distance, tmp_path) -> None:
    path, x = model.write_graph(tmp_path, features=True), pixels(2)
    with onnxruntime.load(path, OPTIONS) as runner:
        got, expected = runner.run(x), model.expected(x, features=True)
    assert [spec.shape for spec in runner.outputs] == [
        ("batch", 16, 16, 16),
        ("batch", 24, 8, 8),
        ("batch", 24, 4, 4),
        ("batch", 24, 2, 2),
    ]
    assert max(distance(got[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize("size", ["fixed", "dynamic"])
def test_taps_are_those_of_the_eager_runner(model, pixels, size, request) -> None:
    path, x = request.getfixturevalue(size), pixels(2)
    taps = block_taps(path)
    options = LoadOptions(threads=1, taps=taps)
    with onnxruntime.load(path, options) as runner, eager.load(model.path, options) as reference:
        got, expected = runner.run(x), reference.run(x)
    assert got.keys() == expected.keys()
    for tap in taps:
        difference = np.abs(got[tap].ravel() - expected[tap].ravel()).max()
        assert difference < 1e-5 * np.abs(expected[tap]).max(), tap
    assert all(isinstance(d, int | str) for spec in runner.outputs for d in spec.shape)


def test_weights_in_a_second_file_are_found(model, runner, pixels, tmp_path) -> None:
    path, x = model.write_graph(tmp_path, limit=1000), pixels(2)
    assert (tmp_path / "toy.onnx.data").stat().st_size > path.stat().st_size
    with onnxruntime.load(path, OPTIONS) as other:
        assert np.array_equal(other.run(x)["logits"], runner.run(x)["logits"])


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads_do_not_change_the_answer(fixed, runner, pixels, distance, threads) -> None:
    x = pixels(2)
    with onnxruntime.load(fixed, LoadOptions(threads=threads)) as other:
        assert distance(other.run(x)["logits"], runner.run(x)["logits"]) < 1e-6


@pytest.fixture
def pools(monkeypatch) -> list[int]:
    """The threads of every session that is opened."""
    opened, create = [], ort.InferenceSession

    def note(source, settings, providers):
        opened.append(settings.intra_op_num_threads)
        return create(source, settings, providers=providers)

    monkeypatch.setattr(ort, "InferenceSession", note)
    return opened


@pytest.mark.parametrize("threads", [1, 3])
def test_one_image_gets_the_threads_asked_for(fixed, pixels, pools, threads) -> None:
    with onnxruntime.load(fixed, LoadOptions(threads=threads)) as other:
        other.run(pixels(1))
    assert pools == [threads]


# Image by image


@pytest.mark.parametrize(
    ("threads", "batch", "images", "opened"),
    [
        (1, 8, 8, [1]),  # one caller
        (2, 8, 8, [1]),  # two callers, and no pool
        (2, 1, 3, [2, 1]),  # two callers, then one with a pool of one
        (4, 1, 2, [4, 3]),  # two callers and a pool of two
        (4, 7, 7, [1, 3]),  # four callers, then two and a pool of two
    ],
)
def test_callers_and_the_pool_are_all_the_threads_there_are(
    fixed, pixels, pools, threads, batch, images, opened
) -> None:
    """A pool has one thread less than its session is opened with, as the caller works, too."""
    with onnxruntime.load(fixed, LoadOptions(threads=threads, batch=batch)) as other:
        other.run(pixels(images))
        other.run(pixels(images))
    assert pools == opened


def test_an_image_gets_the_same_answer_in_every_batch(int8, pixels) -> None:
    """In int8, too, where a range of the whole batch would make them differ."""
    x = pixels(7) * np.linspace(0.5, 4, 7, dtype=np.float32)[:, None, None, None]
    with onnxruntime.load(int8, LoadOptions(threads=2)) as runner:
        alone = np.concatenate([runner.run(x[i : i + 1])["logits"] for i in range(7)])
        for batch in (2, 3, 7):
            assert np.array_equal(runner.run(x[:batch])["logits"], alone[:batch])


def test_a_whole_batch_is_one_request(int8, fixed, pixels, distance) -> None:
    x = pixels(7) * np.linspace(0.5, 4, 7, dtype=np.float32)[:, None, None, None]
    whole = LoadOptions(threads=2, batch=7, whole_batches=True)
    for path, same in ((fixed, True), (int8, False)):
        with (
            onnxruntime.load(path, whole) as runner,
            onnxruntime.load(path, LoadOptions(threads=2)) as other,
        ):
            got, expected = (each.run(x)["logits"] for each in (runner, other))
        assert (distance(got, expected) < 1e-6) == same


def test_a_request_that_fails_ends_the_batch(fixed, pixels, monkeypatch) -> None:
    with onnxruntime.load(fixed, LoadOptions(threads=2, batch=8)) as runner:
        expected = runner.run(pixels(8))["logits"]
        request, calls = onnxruntime.OnnxRuntimeRunner._request, itertools.count()

        def fail_third(self, session, images):
            if next(calls) == 2:
                raise RunnerError("broken")
            return request(self, session, images)

        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime.OnnxRuntimeRunner, "_request", fail_third)
            with pytest.raises(RunnerError, match="broken"):
                runner.run(pixels(8))
        assert next(calls) < 8
        assert np.array_equal(runner.run(pixels(8))["logits"], expected)


def test_another_file_in_the_place_of_the_first_is_not_taken_for_it(
    model, pixels, tmp_path
) -> None:
    path = model.write_graph(tmp_path)
    with onnxruntime.load(path, LoadOptions(threads=2)) as runner:
        path.write_bytes(path.read_bytes())
        runner.run(pixels(1))
        with pytest.raises(RunnerError, match=r"toy\.onnx: another file than was loaded"):
            runner.run(pixels(2))


# What is refused


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 32, 64), "float32"),
        ((2, 1, 64, 64), "float32"),
        ((3, 64, 64), "float32"),
        ((0, 3, 64, 64), "float32"),
        ((2, 3, 64, 64), "float64"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_with_both(runner, shape, dtype) -> None:
    for use in (runner.run, runner.bind):
        with pytest.raises(RunnerError) as caught:
            use(np.zeros(shape, dtype))
        assert f"got {dtype} {shape}" in str(caught.value)
        assert "expected float32 (B >= 1, 3, 64, 64)" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_image_too_small_for_a_dynamic_graph_is_refused(dynamic, capfd) -> None:
    with (
        onnxruntime.load(dynamic, OPTIONS) as runner,
        pytest.raises(RunnerError, match="W >= 32"),
    ):
        runner.run(np.zeros((2, 3, 64, 31), np.float32))
    assert capfd.readouterr() == ("", "")


def test_an_array_in_any_layout_gives_the_same(runner, pixels) -> None:
    x = pixels(2).swapaxes(2, 3)[:, :, ::-1]
    expected = runner.run(np.ascontiguousarray(x))["logits"]
    assert np.array_equal(runner.run(x)["logits"], expected)
    assert np.array_equal(runner.bind(x)()[0], expected)


@pytest.mark.parametrize("kind", ["absent", "empty", "truncated", "cut short", "garbage"])
@pytest.mark.parametrize("taps", [(), ("serial_blocks1.0.image",)], ids=["plain", "tapped"])
def test_a_file_that_is_no_whole_graph_is_corrupt(fixed, tmp_path, kind, taps, capfd) -> None:
    path, whole = tmp_path / "broken.onnx", fixed.read_bytes()
    content = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "cut short": whole[:-9],
        "garbage": b"hello " * 99,
    }
    if kind != "absent":
        path.write_bytes(content[kind])
    with pytest.raises(CorruptArtifact, match=r"broken\.onnx: not a whole ONNX model") as caught:
        onnxruntime.load(path, LoadOptions(taps=taps))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_lost_a_node_is_corrupt(fixed, tmp_path) -> None:
    broken = onnx.load(fixed)
    del broken.graph.node[20]
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(CorruptArtifact, match=r"broken\.onnx: not a whole ONNX model"):
        onnxruntime.load(tmp_path / "broken.onnx", OPTIONS)


@pytest.mark.parametrize("kind", ["absent", "cut short"])
def test_weights_that_are_not_whole_beside_the_graph_are_refused(model, tmp_path, kind) -> None:
    path = model.write_graph(tmp_path, limit=1000)
    data = tmp_path / "toy.onnx.data"
    if kind == "absent":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises((CorruptArtifact, RunnerError), match=r"toy\.onnx: ") as caught:
        onnxruntime.load(path, OPTIONS)
    assert "\n" not in str(caught.value)


def test_a_graph_of_the_future_is_refused_as_one_it_cannot_run(fixed, tmp_path) -> None:
    future = onnx.load(fixed)
    future.opset_import[0].version = 999
    onnx.save(future, tmp_path / "future.onnx")
    with pytest.raises(RunnerError, match=r"future\.onnx: onnxruntime does not load it"):
        onnxruntime.load(tmp_path / "future.onnx", OPTIONS)


# Streams


def test_runs_at_once_give_what_they_give_one_after_another(
    runner, fixed, pixels, distance, at_once
) -> None:
    images = [pixels(batch) * scale for batch, scale in ((1, 1), (3, 2), (2, -1))]
    expected = [runner.run(x)["logits"] for x in images]
    with onnxruntime.load(fixed, LoadOptions(threads=3, streams=3)) as streams:
        calls = [functools.partial(streams.run, x) for x in images]
        for got, logits in zip(at_once(*calls), expected, strict=True):
            assert max(distance(value["logits"], logits) for value in got) < 1e-6


def test_bound_steps_have_buffers_of_their_own(runner, fixed, pixels, distance, at_once) -> None:
    images = [pixels(2) * scale for scale in (1, 2, -1)]
    expected = [runner.run(x)["logits"] for x in images]
    with onnxruntime.load(fixed, LoadOptions(threads=3, streams=3)) as streams:
        steps = [streams.bind(x) for x in images]
        for got, logits in zip(at_once(*steps), expected, strict=True):
            assert max(distance(value[0], logits) for value in got) < 1e-6


@pytest.mark.parametrize(("threads", "streams", "pool"), [(2, 2, 1), (4, 2, 3)])
def test_streams_and_the_pool_are_all_the_threads_there_are(
    fixed, pixels, pools, threads, streams, pool
) -> None:
    with onnxruntime.load(fixed, LoadOptions(threads=threads, streams=streams)) as other:
        other.run(pixels(3))
    assert pools == [pool]
