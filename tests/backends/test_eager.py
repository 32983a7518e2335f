import functools
import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch

from coat_deploy.backends import eager
from coat_deploy.errors import BackendMissing, CoatDeployError, RunnerError, SpecError, WeightsError
from coat_deploy.runner import LoadOptions, TensorSpec

TAPS = ("patch_embed2.image", "serial_blocks1.0.cls", "parallel_blocks.0.image3")


@pytest.fixture(scope="module")
def runner(model):
    with eager.load(model.path, LoadOptions()) as runner:
        yield runner


def test_the_runner_computes_the_network(model, runner, pixels, distance) -> None:
    for batch, size in ((1, (64, 64)), (3, (75, 50)), (2, (250, 190))):
        x = pixels(batch, size)
        got = runner.run(x)
        assert list(got) == ["logits"]
        assert distance(got["logits"], model.expected(x)["logits"]) < 1e-5


def test_a_nano_is_loaded_by_its_variant_not_by_timms_name(nano, pixels, distance) -> None:
    x = pixels(2)
    with eager.load(nano.path, LoadOptions()) as runner:
        assert distance(runner.run(x)["logits"], nano.expected(x)["logits"]) < 1e-5


def test_the_runner_describes_itself(runner) -> None:
    assert runner.target == "eager"
    assert runner.inputs == (TensorSpec("pixels", "float32", ("batch", 3, "height", "width")),)
    assert [spec.name for spec in runner.outputs] == ["logits"]


def test_bind_gives_what_run_gives(runner, pixels) -> None:
    x = pixels(3)
    step = runner.bind(x)
    assert np.array_equal(step().numpy(), runner.run(x)["logits"])
    assert np.array_equal(step().numpy(), runner.run(x)["logits"])


def test_features_are_the_four_maps(model, pixels, distance) -> None:
    x = pixels(2, (75, 50))
    with eager.load(model.path, LoadOptions(features=True)) as runner:
        got, expected = runner.run(x), model.expected(x, features=True)
    assert list(got) == ["x1", "x2", "x3", "x4"] == [spec.name for spec in runner.outputs]
    assert max(distance(got[name], expected[name]) for name in got) < 1e-5


def test_taps_are_returned_beside_the_logits(model, runner, pixels) -> None:
    x = pixels(3)
    with eager.load(model.path, LoadOptions(taps=TAPS)) as tapped:
        got = tapped.run(x)
    assert {name: value.shape for name, value in got.items()} == {
        "logits": (3, 10),
        "patch_embed2.image": (3, 64, 24),
        "serial_blocks1.0.cls": (3, 16),
        "parallel_blocks.0.image3": (3, 16, 24),
    }
    assert np.array_equal(got["logits"], runner.run(x)["logits"])


def test_taps_of_one_run_are_not_those_of_the_next(model, pixels) -> None:
    x = pixels(2)
    with eager.load(model.path, LoadOptions(taps=TAPS)) as tapped:
        first = {name: value.copy() for name, value in tapped.run(x).items()}
        kept = tapped.run(x)
        second = tapped.run(2 * x)
    for name in TAPS:
        assert np.array_equal(kept[name], first[name])
        assert not np.array_equal(second[name], first[name])


def test_a_tap_that_is_no_end_of_a_block_is_named(model, pixels) -> None:
    for tap in ("serial_blocks9.0.image", "serial_blocks1.0.middle", "norm4"):
        with (
            eager.load(model.path, LoadOptions(taps=(tap,))) as runner,
            pytest.raises(RunnerError, match=f"no inner tensor '{tap}'"),
        ):
            runner.run(pixels())


def test_leaving_removes_the_hooks(model) -> None:
    runner = eager.load(model.path, LoadOptions(taps=TAPS))
    blocks = list(runner._network.modules())
    assert sum(len(block._forward_hooks) for block in blocks) == len(TAPS)
    with runner:
        pass
    assert sum(len(block._forward_hooks) for block in blocks) == 0


def test_threads_are_those_asked_for(model) -> None:
    with eager.load(model.path, LoadOptions(threads=2)):
        assert torch.get_num_threads() == 2


def test_compile_goes_through_torch_compile(model, runner, pixels, monkeypatch) -> None:
    # Its default compiler takes a minute and needs another; capturing the graph is the same.
    seen = []

    def compile_without_code(network: torch.nn.Module) -> object:
        seen.append(network)
        return functools.partial(torch_compile, backend="eager")(network)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_code)
    x = pixels(2)
    with eager.load(model.path, LoadOptions(compile=True)) as compiled:
        got = compiled.run(x)["logits"]
        assert np.array_equal(compiled.bind(x)().numpy(), got)
    assert len(seen) == 1
    assert np.abs(got - runner.run(x)["logits"]).max() < 1e-5


def test_fused_computes_the_same(model, runner, pixels, distance) -> None:
    x = pixels(3, (75, 50))
    with eager.load(model.path, LoadOptions(fused=True, taps=TAPS)) as fused:
        got, bound = fused.run(x), fused.bind(x)()
    with eager.load(model.path, LoadOptions(taps=TAPS)) as plain:
        expected = plain.run(x)
    assert max(distance(got[name], expected[name]) for name in expected) < 1e-5
    assert np.array_equal(bound.numpy(), got["logits"])


@pytest.mark.parametrize("fused", [False, True], ids=["amp", "fused"])
@pytest.mark.parametrize(("precision", "bar"), [("fp16", 0.02), ("bf16", 0.1)])
def test_low_precisions_compute_nearly_the_same(
    model, runner, pixels, distance, fused, precision, bar
) -> None:
    x = pixels(3)
    options = LoadOptions(precision=precision, fused=fused, taps=TAPS)
    with eager.load(model.path, options) as low:
        got, bound = low.run(x), low.bind(x)()
    assert 0 < distance(got["logits"], runner.run(x)["logits"]) < bar
    assert all(got[tap].dtype == np.float32 for tap in TAPS)
    assert str(bound.dtype) == {"fp16": "torch.float16", "bf16": "torch.bfloat16"}[precision]


def test_fused_without_triton_is_a_missing_backend(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match="pip install triton"):
        eager.load(tmp_path, LoadOptions(fused=True, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("precision", "bar"), [("fp32", 1e-4), ("fp16", 0.02), ("bf16", 0.1)])
def test_a_gpu_computes_fused_the_same(nano, pixels, distance, precision, bar, compiled) -> None:
    x = pixels(80, (64, 64))
    options = LoadOptions(precision=precision, fused=True, compile=compiled, device="cuda")
    with eager.load(nano.path, options) as fused:
        assert distance(fused.run(x)["logits"], nano.expected(x)["logits"]) < bar


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 31, 64), "float32"),
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
        assert "expected float32 (B >= 1, 3, H >= 32, W >= 32)" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_array_in_any_layout_gives_the_same(runner, pixels) -> None:
    x = pixels(2, (64, 96)).swapaxes(2, 3)[:, :, ::-1]
    expected = runner.run(np.ascontiguousarray(x))["logits"]
    assert np.array_equal(runner.run(x)["logits"], expected)
    assert np.array_equal(runner.bind(x)().numpy(), expected)
    frozen = np.ascontiguousarray(x)
    frozen.flags.writeable = False
    assert np.array_equal(runner.run(frozen)["logits"], expected)


def test_a_pixel_that_is_not_finite_spoils_its_image_only(runner, pixels) -> None:
    x = pixels(3)
    x[1, 0, 5, 5] = np.nan
    assert np.isnan(runner.run(x)["logits"]).all(axis=1).tolist() == [False, True, False]


# Model folders


def test_a_folder_without_weights_names_the_file(model, tmp_path) -> None:
    (tmp_path / "config.json").write_bytes((model.path / "config.json").read_bytes())
    with pytest.raises(CoatDeployError, match=r"model\.safetensors"):
        eager.load(tmp_path, LoadOptions())


@pytest.mark.parametrize("kind", ["empty", "truncated", "garbage"])
def test_damaged_weights_name_the_file(model, other_model, kind) -> None:
    path = other_model() / "model.safetensors"
    whole = path.read_bytes()
    content = {"empty": b"", "truncated": whole[:-100], "garbage": b"hello " * 99}
    path.write_bytes(content[kind])
    with pytest.raises(WeightsError, match=r"model\.safetensors: damaged"):
        eager.load(path.parent, LoadOptions())


def test_weights_of_another_network_are_refused(other_model) -> None:
    folder = other_model(architecture="coat_lite_toy")
    with pytest.raises(WeightsError, match="does not fit coat_lite_toy .*It fits coat_toy"):
        eager.load(folder, LoadOptions())


def test_a_config_that_is_no_config_is_refused(other_model) -> None:
    folder = other_model()
    (folder / "config.json").write_text("[]")
    with pytest.raises(SpecError, match=r"config\.json"):
        eager.load(folder, LoadOptions())


def test_switches_of_the_config_reach_the_network(model, runner, other_model, pixels) -> None:
    x = pixels(2)
    with eager.load(other_model(model_args={"co_scale": "none"}), LoadOptions()) as other:
        assert np.abs(other.run(x)["logits"] - runner.run(x)["logits"]).max() > 0.01


def test_a_compiled_network_without_its_compiler_is_a_missing_backend(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendMissing, match="expected no-such-compiler"):
        eager.load(tmp_path, LoadOptions(compile=True))


# Streams


def test_runs_at_once_give_what_they_give_one_after_another(
    model, runner, pixels, distance, at_once
) -> None:
    images = [pixels(batch) * scale for batch, scale in ((1, 1), (3, 2), (2, -1))]
    expected = [runner.run(x)["logits"] for x in images]
    with eager.load(model.path, LoadOptions(threads=3, streams=3)) as streams:
        calls = [functools.partial(streams.run, x) for x in images]
        for got, logits in zip(at_once(*calls), expected, strict=True):
            assert max(distance(value["logits"], logits) for value in got) < 1e-6


def test_bound_steps_have_buffers_of_their_own(model, runner, pixels, distance, at_once) -> None:
    images = [pixels(2) * scale for scale in (1, 2, -1)]
    expected = [runner.run(x)["logits"] for x in images]
    with eager.load(model.path, LoadOptions(threads=3, streams=3)) as streams:
        steps = [streams.bind(x) for x in images]
        for got, logits in zip(at_once(*steps), expected, strict=True):
            assert max(distance(value.numpy(), logits) for value in got) < 1e-6


def test_every_calling_thread_has_its_share_of_the_threads(model, pixels, at_once) -> None:
    with eager.load(model.path, LoadOptions(threads=4, streams=2)) as streams:
        assert torch.get_num_threads() == 2

        def counted(step: Callable[[], object]) -> int:
            torch.set_num_threads(7)
            step()
            return torch.get_num_threads()

        steps = [streams.bind(pixels()), lambda: streams.run(pixels())]
        calls = [functools.partial(counted, step) for step in steps]
        assert at_once(*calls, times=1) == [[2], [2]]


def test_taps_of_threads_do_not_mix(model, pixels, at_once) -> None:
    images = [pixels(), 2 * pixels()]
    with eager.load(model.path, LoadOptions(threads=2, streams=2, taps=TAPS)) as tapped:
        expected = [tapped.run(x) for x in images]
        calls = [functools.partial(tapped.run, x) for x in images]
        for got, alone in zip(at_once(*calls), expected, strict=True):
            for value in got:
                assert all(np.array_equal(value[tap], alone[tap]) for tap in TAPS)


@pytest.fixture
def rounding():
    """What may round float32 to TF32, allowed to, and put back as it was."""
    kinds = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = True
    yield kinds
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed


@pytest.mark.parametrize(
    ("device", "precision", "allowed"),
    [("cuda", "fp32", False), ("cuda", "fp16", True), ("cpu", "fp32", True)],
)
def test_tf32_is_forbidden_where_fp32_is_asked_for_on_a_gpu(
    rounding, device, precision, allowed
) -> None:
    eager.keep_float32(LoadOptions(device=device, precision=precision))
    assert [kind.allow_tf32 for kind in rounding] == [allowed, allowed]
