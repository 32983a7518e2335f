import functools
from pathlib import Path

import numpy as np
import onnx
import pytest

openvino_package = pytest.importorskip("openvino")

from coat_deploy.backends import eager, openvino, openvino_compile  # noqa: E402
from coat_deploy.cache import keep  # noqa: E402
from coat_deploy.errors import (  # noqa: E402
    CorruptArtifact,
    PrecisionMissing,
    RunnerError,
    UsageError,
)
from coat_deploy.graph.taps import block_taps  # noqa: E402
from coat_deploy.runner import LoadOptions, TensorSpec  # noqa: E402

OPTIONS = LoadOptions(threads=1)
BF16 = LoadOptions(threads=1, precision="bf16")


@pytest.fixture(scope="module")
def fixed(model, tmp_path_factory) -> Path:
    return model.write_graph(tmp_path_factory.mktemp("fixed"), target="openvino")


@pytest.fixture(scope="module")
def dynamic(model, tmp_path_factory) -> Path:
    return model.write_graph(tmp_path_factory.mktemp("dynamic"), size=None, target="openvino")


@pytest.fixture(scope="module")
def runner(fixed):
    with openvino.load(fixed, OPTIONS) as runner:
        yield runner


@pytest.fixture(scope="module")
def computes_bf16() -> bool:
    capabilities = openvino_package.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in capabilities


@pytest.fixture
def needs_bf16(computes_bf16) -> None:
    if not computes_bf16:
        pytest.skip("needs a CPU with AMX-BF16 or AVX512-BF16")


def test_the_runner_computes_the_network(model, runner, pixels, distance) -> None:
    for batch in (1, 3, 8, 1):
        x = pixels(batch)
        got = runner.run(x)
        assert list(got) == ["logits"]
        assert distance(got["logits"], model.expected(x)["logits"]) < 1e-5


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_a_dynamic_graph_of_either_form_runs_at_any_size(
    model, pixels, distance, tmp_path, target
) -> None:
    path = model.write_graph(tmp_path, size=None, target=target)
    with openvino.load(path, OPTIONS) as runner:
        for size in ((64, 64), (75, 50), (33, 190)):
            x = pixels(2, size)
            got = runner.run(x)["logits"]
            assert distance(got, model.expected(x)["logits"]) < 1e-5


def test_a_graph_of_odd_size_runs(model, pixels, distance, tmp_path) -> None:
    path, x = model.write_graph(tmp_path, size=(75, 50), target="openvino"), pixels(3, (75, 50))
    with openvino.load(path, OPTIONS) as runner:
        assert distance(runner.run(x)["logits"], model.expected(x)["logits"]) < 1e-5


def test_a_nano_runs_with_a_fixed_and_a_dynamic_size(nano, pixels, distance, tmp_path) -> None:
    x = pixels(3)
    for size in ((64, 64), None):
        with openvino.load(nano.write_graph(tmp_path, size, target="openvino"), OPTIONS) as runner:
            assert distance(runner.run(x)["logits"], nano.expected(x)["logits"]) < 1e-5


def test_the_runner_describes_itself(runner, dynamic) -> None:
    assert runner.target == "openvino"
    assert runner.inputs == (TensorSpec("pixels", "float32", ("?", 3, 64, 64)),)
    assert runner.outputs == (TensorSpec("logits", "float32", ("?", 10)),)
    with openvino.load(dynamic, OPTIONS) as other:
        assert other.inputs[0].shape == ("?", 3, "?", "?")


def test_bind_gives_what_run_gives(runner, pixels) -> None:
    x = pixels(3)
    step = runner.bind(x)
    for _ in range(2):
        (got,) = step().values()
        assert np.array_equal(got, runner.run(x)["logits"])


def test_an_answer_stays_when_the_next_is_computed(runner, pixels) -> None:
    x = pixels(2)
    first = runner.run(x)["logits"]
    before = first.copy()
    runner.run(2 * x)
    assert np.array_equal(first, before)


@pytest.mark.parametrize("taps", [(), ("serial_blocks1.0.image",)], ids=["plain", "tapped"])
def test_features_are_the_four_maps(model, pixels, distance, tmp_path, taps) -> None:
    # Compiling joins x1 with the map that the next scale embeds, which is equal.
    path, x = model.write_graph(tmp_path, features=True, target="openvino"), pixels(2)
    with openvino.load(path, LoadOptions(threads=1, taps=taps)) as runner:
        got, expected = runner.run(x), model.expected(x, features=True)
    assert [spec.name for spec in runner.outputs] == ["x1", "x2", "x3", "x4", *taps]
    assert max(distance(got[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize("size", ["fixed", "dynamic"])
def test_taps_are_those_of_the_eager_runner(model, pixels, size, request) -> None:
    path, x = request.getfixturevalue(size), pixels(2)
    taps = block_taps(path)
    options = LoadOptions(threads=1, taps=taps)
    with openvino.load(path, options) as runner, eager.load(model.path, options) as reference:
        got, expected = runner.run(x), reference.run(x)
    assert got.keys() == expected.keys()
    for tap in taps:
        difference = np.abs(got[tap].ravel() - expected[tap].ravel()).max()
        assert difference < 1e-5 * np.abs(expected[tap]).max(), tap


def test_a_tensor_that_is_not_there_is_named(fixed) -> None:
    with pytest.raises(RunnerError, match=r"toy\.onnx: .*serial_blocks9\.0\.image") as caught:
        openvino.load(fixed, LoadOptions(taps=("serial_blocks9.0.image",)))
    assert "\n" not in str(caught.value)


def test_weights_in_a_second_file_are_found(model, runner, pixels, tmp_path) -> None:
    path, x = model.write_graph(tmp_path, target="openvino", limit=1000), pixels(2)
    with openvino.load(path, OPTIONS) as other:
        assert np.array_equal(other.run(x)["logits"], runner.run(x)["logits"])


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads_are_those_asked_for(fixed, threads) -> None:
    with openvino.load(fixed, LoadOptions(threads=threads)) as runner:
        used = runner._lanes[1].compiled.model.get_property("INFERENCE_NUM_THREADS")
    assert used == threads if threads else used >= 1


# bfloat16


@pytest.mark.usefixtures("needs_bf16")
def test_bf16_agrees_with_the_network_within_its_precision(model, fixed, pixels) -> None:
    x = pixels(8)
    with openvino.load(fixed, BF16) as runner:
        got = runner.run(x)["logits"]
    expected = model.expected(x)["logits"]
    assert got.dtype == np.float32
    got, expected = (y - y.mean(axis=1, keepdims=True) for y in (got, expected))
    cosine = (
        (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    )
    assert cosine.min() > 0.999
    # 8 bits of precision: were it float32 in disguise, it would be nearer.
    assert np.abs(got - expected).max() > 1e-4


def test_a_cpu_without_bf16_is_told_so(fixed, computes_bf16) -> None:
    if computes_bf16:
        pytest.skip("this CPU computes in bfloat16")
    with pytest.raises(PrecisionMissing, match=r"toy\.onnx: this CPU does not compute in bf16"):
        openvino.load(fixed, BF16)


def test_a_precision_that_openvino_replaced_is_refused(fixed, monkeypatch) -> None:
    """As on a CPU without bfloat16, where OpenVINO computes in float32 and says nothing."""
    compile_model = openvino_package.Core.compile_model

    def compile_as_float32(self, model, device, settings):
        # Without snippets, in which float32 would crash (openvino_compile._has_small_ffn).
        as_float32 = {"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"}
        return compile_model(self, model, device, settings | as_float32)

    monkeypatch.setattr(openvino_package.Core, "compile_model", compile_as_float32)
    with pytest.raises(PrecisionMissing) as caught:
        openvino.load(fixed, BF16)
    assert "does not compute in bf16 (OpenVINO would use f32)" in str(caught.value)


def test_an_unknown_precision_suggests_the_nearest(fixed) -> None:
    with pytest.raises(UsageError, match=r"'bf1' \(known: fp32, bf16\).*Did you mean 'bf16'\?"):
        openvino.load(fixed, LoadOptions(precision="bf1"))


# Refusals


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 32, 64), "float32"),
        ((2, 1, 64, 64), "float32"),
        ((3, 64, 64), "float32"),
        ((0, 3, 64, 64), "float32"),
        ((2, 3, 64, 64), "float64"),
        ((2, 3, 64, 64), "uint8"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_with_both(runner, shape, dtype) -> None:
    for use in (runner.run, runner.bind):
        with pytest.raises(RunnerError) as caught:
            use(np.zeros(shape, dtype))
        assert f"got {dtype} {shape}" in str(caught.value)
        assert "expected float32 (B >= 1, 3, 64, 64)" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_image_too_small_for_a_dynamic_graph_is_refused(dynamic, pixels) -> None:
    # OpenVINO itself returns the answer to the last image that was large enough.
    with openvino.load(dynamic, OPTIONS) as runner:
        runner.run(pixels(2))
        with pytest.raises(RunnerError, match=r"got float32 \(2, 3, 32, 16\).*W >= 32"):
            runner.run(np.zeros((2, 3, 32, 16), np.float32))


def test_an_array_in_any_layout_gives_the_same(runner, pixels) -> None:
    x = pixels(2).swapaxes(2, 3)[:, :, ::-1]
    expected = runner.run(np.ascontiguousarray(x))["logits"]
    assert np.array_equal(runner.run(x)["logits"], expected)
    (got,) = runner.bind(x)().values()
    assert np.array_equal(got, expected)


def test_a_pixel_that_is_not_finite_spoils_its_image_only(runner, pixels) -> None:
    for value in (np.nan, np.inf):
        x = pixels(3)
        x[1, 0, 5, 5] = value
        assert np.isnan(runner.run(x)["logits"]).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", ["absent", "empty", "truncated", "cut short", "garbage"])
def test_a_file_that_is_no_whole_graph_is_corrupt(fixed, tmp_path, kind, capfd) -> None:
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
        openvino.load(path, OPTIONS)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_lost_a_node_is_corrupt(fixed, tmp_path) -> None:
    broken = onnx.load(fixed)
    del broken.graph.node[20]
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(CorruptArtifact, match=r"broken\.onnx: not a whole ONNX model"):
        openvino.load(tmp_path / "broken.onnx", OPTIONS)


@pytest.mark.parametrize("kind", ["absent", "cut short"])
def test_weights_that_are_not_whole_beside_the_graph_are_refused(model, tmp_path, kind) -> None:
    path = model.write_graph(tmp_path, target="openvino", limit=1000)
    data = tmp_path / "toy.onnx.data"
    if kind == "absent":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CorruptArtifact, match=r"toy\.onnx: not a whole ONNX model") as caught:
        openvino.load(path, OPTIONS)
    assert "\n" not in str(caught.value)


# Known numbers of images


def test_an_image_gets_the_same_answer_in_every_batch(fixed, dynamic, pixels) -> None:
    for path in (fixed, dynamic):
        with openvino.load(path, LoadOptions(threads=2)) as runner:
            x = pixels(7)
            alone = np.concatenate([runner.run(x[i : i + 1])["logits"] for i in range(7)])
            for batch in (2, 3, 7):
                assert np.abs(runner.run(x[:batch])["logits"] - alone[:batch]).max() < 1e-6


@pytest.mark.parametrize("batch", [2, 3, 4, 7])
def test_a_runner_for_a_batch_takes_others_too(fixed, pixels, batch) -> None:
    x = pixels(7)
    with openvino.load(fixed, OPTIONS) as runner:
        expected = runner.run(x)["logits"]
    with openvino.load(fixed, LoadOptions(threads=2, batch=batch)) as runner:
        assert runner.inputs[0].shape == ("?", 3, 64, 64)
        for count in (7, 1, batch, 2 * batch - 1):
            got = runner.run(x[:count])["logits"]
            assert np.abs(got - expected[:count]).max() < 1e-6
            (got,) = runner.bind(x[:count])().values()
            assert np.abs(got - expected[:count]).max() < 1e-6


def test_a_batch_is_known_where_it_is_safe(model, dynamic, tmp_path) -> None:
    """Not of open sizes, and not where the last map is a column (which OpenVINO gets wrong)."""
    for size, batch in (((64, 64), 3), ((64, 52), 1), ((64, 40), 1), ((52, 64), 3)):
        path = model.write_graph(tmp_path, size=size, target="openvino")
        assert openvino_compile.Compiler(path, "fp32", 1).compile(1, 3).batch == batch
    assert openvino_compile.Compiler(dynamic, "fp32", 1).compile(1, 3).batch == 1


@pytest.mark.usefixtures("needs_bf16")
@pytest.mark.parametrize("size", [(64, 52), (97, 63), (131, 52), (64, 64), (52, 97)])
def test_bf16_is_right_at_sizes_that_openvino_gets_wrong(nano, pixels, tmp_path, size) -> None:
    path, x = nano.write_graph(tmp_path, size=size, target="openvino"), pixels(5, size)
    with openvino.load(path, OPTIONS) as runner:
        expected = runner.run(x)["logits"]
    with openvino.load(path, LoadOptions(threads=2, precision="bf16", batch=5)) as runner:
        got = runner.run(x)["logits"]
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.999


def test_models_are_compiled_for_the_batches_that_come(fixed, pixels, monkeypatch) -> None:
    told, compile_model = [], openvino_package.Core.compile_model

    def note(self, model, device, settings):
        told.append(settings.get("NUM_STREAMS", 1))
        return compile_model(self, model, device, settings)

    monkeypatch.setattr(openvino_package.Core, "compile_model", note)
    with openvino.load(fixed, LoadOptions(threads=2, batch=5)) as runner:
        runner.run(pixels(8))
        assert told == [1, 2, 1]  # five together, two at once, and one with all threads
        for batch in (10, 1, 3, 4):
            runner.run(pixels(batch))
        assert told == [1, 2, 1]


def test_another_file_in_the_place_of_the_first_is_not_taken_for_it(
    model, pixels, tmp_path
) -> None:
    path = model.write_graph(tmp_path, target="openvino")
    with openvino.load(path, LoadOptions(threads=2)) as runner:
        path.write_bytes(path.read_bytes())
        runner.run(pixels(1))
        with pytest.raises(RunnerError, match=r"toy\.onnx: another file than was loaded"):
            runner.run(pixels(2))


def test_a_batch_that_fails_leaves_all_requests_free(fixed, pixels, monkeypatch) -> None:
    with openvino.load(fixed, LoadOptions(threads=2)) as runner:
        expected = runner.run(pixels(5))["logits"]
        lanes, failing = runner._lanes[2], iter([False, True])
        finish = openvino.Lanes._finish

        def fail_second(self, request):
            values = finish(self, request)
            if next(failing, False):
                raise RuntimeError("broken")
            return values

        with monkeypatch.context() as patch:
            patch.setattr(openvino.Lanes, "_finish", fail_second)
            with pytest.raises(RunnerError, match=r"openvino: broken .input \(4, 3, 64, 64\)"):
                runner.run(pixels(5))
        assert lanes._idle.qsize() == 2
        assert np.array_equal(runner.run(pixels(5))["logits"], expected)


# Streams


def test_runs_at_once_give_what_they_give_one_after_another(
    runner, fixed, pixels, distance, at_once
) -> None:
    images = [pixels(batch) * scale for batch, scale in ((1, 1), (3, 2), (2, -1))]
    expected = [runner.run(x)["logits"] for x in images]
    with openvino.load(fixed, LoadOptions(threads=3, streams=3)) as streams:
        calls = [functools.partial(streams.run, x) for x in images]
        for got, logits in zip(at_once(*calls), expected, strict=True):
            assert max(distance(value["logits"], logits) for value in got) < 1e-6


def test_bound_steps_have_buffers_of_their_own(runner, fixed, pixels, distance, at_once) -> None:
    images = [pixels(2) * scale for scale in (1, 2, -1)]
    expected = [runner.run(x)["logits"] for x in images]
    with openvino.load(fixed, LoadOptions(threads=3, streams=3)) as streams:
        steps = [streams.bind(x) for x in images]
        for got, logits in zip(at_once(*steps), expected, strict=True):
            assert max(distance(next(iter(value.values())), logits) for value in got) < 1e-6


def test_openvino_is_told_how_many_streams_share_the_threads(fixed, monkeypatch) -> None:
    """As it is told: it makes no more streams than there are processors."""
    told = {}
    compile_model = openvino_package.Core.compile_model

    def note(self, model, device, settings):
        told.update(settings)
        return compile_model(self, model, device, settings)

    monkeypatch.setattr(openvino_package.Core, "compile_model", note)
    openvino.load(fixed, LoadOptions(threads=4, streams=2)).close()
    assert (told["NUM_STREAMS"], told["INFERENCE_NUM_THREADS"]) == (2, 4)
    assert told["PERFORMANCE_HINT"] == "THROUGHPUT"


def test_a_request_that_was_refused_is_used_again(fixed, pixels, monkeypatch) -> None:
    with openvino.load(fixed, LoadOptions(threads=2, streams=2)) as streams:
        with monkeypatch.context() as patch:
            patch.setattr(openvino, "accept", lambda pixels, spec, target: pixels)
            for _ in range(3):
                with pytest.raises(RunnerError, match=r"openvino: .*input \(2, 3, 32, 64\)"):
                    streams.run(pixels(2, (32, 64)))
        assert streams.run(pixels(2))["logits"].shape == (2, 10)


# What was compiled is kept.


@pytest.fixture
def never_read(monkeypatch):
    """Return a function after which no ONNX file can be read."""

    def read(path):
        raise AssertionError(f"{path} was read")

    return lambda: monkeypatch.setattr(openvino_compile, "_read", read)


def cached(folder: Path, **changes) -> LoadOptions:
    return LoadOptions(threads=1, cache=folder / "cache" / "one", **changes)


@pytest.mark.parametrize("features", [False, True])
def test_a_second_load_computes_the_same_without_reading_the_graph(
    model, pixels, tmp_path, never_read, features
) -> None:
    path, x = model.write_graph(tmp_path, features=features, target="openvino"), pixels(3)
    with openvino.load(path, cached(tmp_path)) as runner:
        first, outputs = runner.run(x), runner.outputs
    never_read()
    with openvino.load(path, cached(tmp_path)) as runner:
        assert runner.outputs == outputs
        second = runner.run(x)
    assert list(second) == list(first)
    assert all(np.array_equal(second[name], first[name]) for name in first)


def test_a_second_load_of_a_dynamic_graph_takes_any_size(
    model, dynamic, pixels, distance, tmp_path, never_read
) -> None:
    openvino.load(dynamic, cached(tmp_path)).close()
    never_read()
    with openvino.load(dynamic, cached(tmp_path)) as runner:
        for x in (pixels(1), pixels(2, (75, 50))):
            assert distance(runner.run(x)["logits"], model.expected(x)["logits"]) < 1e-5


@pytest.mark.usefixtures("needs_bf16")
def test_precisions_are_kept_apart(fixed, pixels, tmp_path) -> None:
    x, found = pixels(2), []
    for precision in ("fp32", "bf16") * 2:
        with openvino.load(fixed, cached(tmp_path, precision=precision)) as runner:
            found.append(runner.run(x)["logits"])
    assert len(list((tmp_path / "cache" / "one").iterdir())) == 2
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3])
    assert not np.array_equal(found[0], found[1])


def test_taps_are_compiled_anew_and_not_kept(fixed, pixels, tmp_path) -> None:
    openvino.load(fixed, cached(tmp_path)).close()
    (kept,) = (tmp_path / "cache" / "one").iterdir()
    taps = ("serial_blocks1.0.image",)
    with openvino.load(fixed, cached(tmp_path, taps=taps)) as runner:
        assert list(runner.run(pixels(1))) == ["logits", *taps]
    assert list(kept.parent.iterdir()) == [kept]


def test_without_a_cache_nothing_is_kept(fixed, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(openvino_compile, "keep", None)  # calling it would fail
    openvino.load(fixed, OPTIONS).close()


@pytest.mark.parametrize("kind", ["another's", "cut", "flipped", "not names"])
def test_what_is_kept_but_no_use_is_compiled_anew(
    fixed, runner, pixels, tmp_path, never_read, kind
) -> None:
    openvino.load(fixed, cached(tmp_path)).close()
    (kept,) = (tmp_path / "cache" / "one").iterdir()
    whole = kept.read_bytes()
    if kind == "another's":
        keep(kept, b'["logits"]\n', b"compiled by nobody we know" * 99)
    elif kind == "not names":
        keep(kept, b"logits\n", whole[32:].partition(b"\n")[2])
    else:
        flipped = whole[:-1000] + bytes(b ^ 1 for b in whole[-1000:])
        kept.write_bytes(flipped if kind == "flipped" else whole[:-1000])
    x = pixels(2)
    for _ in range(2):
        with openvino.load(fixed, cached(tmp_path)) as again:
            assert np.array_equal(again.run(x)["logits"], runner.run(x)["logits"])
        never_read()  # what is kept is of use now


def test_a_cache_that_cannot_be_written_is_done_without(fixed, pixels, tmp_path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    for _ in range(2):
        with openvino.load(fixed, cached(tmp_path)) as runner:
            assert runner.run(pixels(1))["logits"].shape == (1, 10)


def test_a_runtime_that_hands_nothing_out_is_used_all_the_same(fixed, tmp_path) -> None:
    class Closed:
        def export_model(self) -> None:
            raise RuntimeError("not implemented")

    compiled = openvino_compile.Compiled(Closed(), 1, (), ())
    openvino_compile._export(compiled, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
