"""onnxruntime on a GPU against an onnxruntime that is made up: what it must never do in silence."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from coat_deploy.backends import onnxruntime, onnxruntime_cuda, onnxruntime_tensorrt
from coat_deploy.errors import (
    BackendMissing,
    DeviceMissing,
    PrecisionMissing,
    RunnerError,
    UsageError,
)
from coat_deploy.open import load_unchecked
from coat_deploy.runner import LoadOptions

CUDA = LoadOptions(device="cuda")
NODE = SimpleNamespace(name="serial_blocks1.0.norm1", op_type="LayerNormalization")
SHAPE = SimpleNamespace(name="serial_blocks2.0.size_2", op_type="Shape")
ADD = SimpleNamespace(name="serial_blocks1.0.attended", op_type="Add")


class FakeValue:
    def __init__(self, values):
        self.values = values

    def shape(self):
        return list(self.values.shape)

    def numpy(self):
        return self.values

    def update_inplace(self, values):
        self.values[:] = values


class FakeBinding:
    def __init__(self):
        self.input, self.outputs = None, {}

    def bind_ortvalue_input(self, name, value):
        self.input = value

    def bind_output(self, name, device):
        assert device == "cuda"
        self.outputs[name] = None

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = value

    def clear_binding_outputs(self):
        self.outputs = {}

    def get_outputs(self):
        return list(self.outputs.values())


class FakeSession:
    """Sums each image; `cpu` are the nodes that it would compute on the CPU."""

    def __init__(self, cpu=(), providers=("CUDAExecutionProvider", "CPUExecutionProvider")):
        self.cpu, self.providers, self.graphs = cpu, providers, []
        self.shape, self.memory = ["batch", 3, 32, 32], 64

    def get_providers(self):
        return list(self.providers)

    def get_provider_graph_assignment_info(self):
        parts = {"CUDAExecutionProvider": [SHAPE], "CPUExecutionProvider": list(self.cpu)}
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda nodes=nodes: nodes)
            for name, nodes in parts.items()
        ]

    def get_inputs(self):
        return [SimpleNamespace(name="pixels", type="tensor(float)", shape=self.shape)]

    def get_outputs(self):
        return [SimpleNamespace(name="logits", type="tensor(float)", shape=["batch", 1])]

    def io_binding(self):
        return FakeBinding()

    def run_with_iobinding(self, binding, options):
        if len(binding.input.values) > self.memory:
            raise RuntimeError("BFCArena: Failed to allocate memory")
        self.graphs.append(options.get_run_config_entry("gpu_graph_id"))
        sums = binding.input.values.sum((1, 2, 3))[:, None]
        for name, value in binding.outputs.items():
            if value is None:
                binding.outputs[name] = FakeValue(sums)
            else:
                value.values[:] = sums


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Load a file on a made-up GPU; `opened` has the settings of every session."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)

    def empty(shape, dtype, device, number):
        return FakeValue(np.zeros(shape, dtype))

    monkeypatch.setattr(ort, "OrtValue", SimpleNamespace(ortvalue_from_shape_and_type=empty))

    def load(session, options=CUDA):
        load.opened = []

        def create(source, settings, providers):
            strict = settings.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
            load.opened.append((strict, dict(providers)["CUDAExecutionProvider"]))
            load.providers = dict(providers)
            if strict and session.cpu:
                raise RuntimeError("This session contains graph nodes that fallback to the CPU")
            return session

        monkeypatch.setattr(ort, "InferenceSession", create)
        return onnxruntime.load(tmp_path / "toy.onnx", options)

    monkeypatch.setattr(
        ort.SessionOptions, "get_session_config_entry", _entry_or_nothing(ort), raising=True
    )
    return load


def _entry_or_nothing(ort):
    get = ort.SessionOptions.get_session_config_entry

    def entry(self, key):
        try:
            return get(self, key)
        except RuntimeError:
            return ""

    return entry


def pixels(batch):
    return np.random.default_rng(batch).standard_normal((batch, 3, 32, 32), np.float32)


def sums(x):
    return x.sum((1, 2, 3))[:, None]


def test_a_session_of_the_gpu_computes_there(load) -> None:
    with load(FakeSession()) as runner:
        for batch in (1, 4, 1):
            got = runner.run(pixels(batch))["logits"]
            assert np.allclose(got, sums(pixels(batch)), atol=1e-3)
    assert load.opened == [(True, {"device_id": "0", "use_tf32": "0", "enable_cuda_graph": "1"})]


def test_every_shape_has_a_cuda_graph_of_its_own(load) -> None:
    session = FakeSession()
    with load(session) as runner:
        for batch in (1, 4, 1, 4):
            runner.run(pixels(batch))
    # Each shape once outside of graphs, once to capture it, and then by its number.
    assert session.graphs == ["-1", "1", "1", "-1", "2", "2", "1", "2"]


def test_batches_are_filled_up_to_a_few_shapes(load) -> None:
    with load(FakeSession(), LoadOptions(device="cuda", batch=12)) as runner:
        for batch in (2, 1, 3, 4, 5, 8, 9, 11, 12, 13):
            got = runner.run(pixels(batch))["logits"]
            assert got.shape == (batch, 1)
            assert np.allclose(got, sums(pixels(batch)), atol=1e-3)
        assert [shape[0] for shape in runner._bound] == [2, 1, 4, 8, 12, 13]


def test_as_many_shapes_stay_ready_as_batches_are_filled_up_to(load) -> None:
    doubled = [1 << power for power in range(11)]
    session = FakeSession()
    session.memory = 1 << 20
    with load(session, LoadOptions(device="cuda", batch=1024)) as runner:
        for batch in (2, *doubled):
            runner.run(np.ones((batch, 3, 32, 32), np.float32))
        assert sorted(shape[0] for shape in runner._bound) == doubled


def test_without_a_largest_batch_each_is_computed_as_it_is(load) -> None:
    with load(FakeSession()) as runner:
        for batch in (8, 3, 2, 1):
            runner.run(pixels(batch))
        assert [shape[0] for shape in runner._bound] == [8, 3, 2, 1]


def test_only_images_of_the_same_size_are_filled_up(load) -> None:
    session = FakeSession()
    session.shape = ["batch", 3, "height", "width"]
    with load(session, LoadOptions(device="cuda", batch=4)) as runner:
        wide = np.ones((3, 3, 32, 64), np.float32)
        runner.run(pixels(4))
        assert np.allclose(runner.run(wide)["logits"], sums(wide))
        assert list(runner._bound) == [(4, 3, 32, 32), (4, 3, 32, 64)]


def test_float32_is_float32_unless_tf32_is_asked_for(load) -> None:
    load(FakeSession(), LoadOptions(device="cuda", precision="tf32")).close()
    assert load.opened[0][1]["use_tf32"] == "1"


def test_nodes_on_the_cpu_are_refused_by_name(load) -> None:
    with pytest.raises(RunnerError) as caught:
        load(FakeSession(cpu=[SHAPE, NODE]))
    assert "would compute 1 nodes on the CPU: serial_blocks1.0.norm1 (Layer" in str(caught.value)
    with pytest.raises(RunnerError, match=r"on the CPU: serial_blocks1\.0\.attended \(Add\)"):
        load(FakeSession(cpu=[SHAPE, ADD]))


def test_shapes_alone_may_be_computed_on_the_cpu(load) -> None:
    session = FakeSession(cpu=[SHAPE])
    with load(session) as runner:
        assert np.allclose(runner.run(pixels(2))["logits"], sums(pixels(2)), atol=1e-3)
    assert [strict for strict, _ in load.opened] == [True, False]
    assert load.opened[1][1]["enable_cuda_graph"] == "0"
    assert set(session.graphs) == {"-1"}


def test_a_session_of_the_cpu_is_refused(load) -> None:
    with pytest.raises(
        DeviceMissing, match="by CUDAExecutionProvider .it took CPUExecutionProvider"
    ):
        load(FakeSession(providers=["CPUExecutionProvider"]))


def test_a_package_without_cuda_says_which_to_install(load, monkeypatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceMissing, match=r"pip uninstall onnxruntime, then: pip install"):
        load(FakeSession())


def test_memory_that_lacks_is_told(load) -> None:
    with load(FakeSession()) as runner:
        with pytest.raises(RunnerError, match=r"Failed to allocate memory\. Take a smaller batch"):
            runner.run(pixels(65))
        runner.run(pixels(2))


def test_shapes_beyond_the_most_make_room(load) -> None:
    with load(FakeSession()) as runner:
        for batch in range(1, 20):
            runner.run(pixels(batch))
        assert len(runner._bound) == onnxruntime_cuda.MAX_SHAPES


def test_bound_steps_have_memory_of_their_own(load) -> None:
    with load(FakeSession()) as runner:
        first, second = runner.bind(pixels(2)), runner.bind(2 * pixels(2))
        one, two = first(), second()
        assert np.allclose(one.get()[0], sums(pixels(2)), atol=1e-3)
        assert np.allclose(two.get()[0], sums(2 * pixels(2)), atol=1e-3)


@pytest.mark.parametrize("options", [{"taps": ("x",)}, {"streams": 2, "threads": 2}])
def test_what_a_gpu_does_not_do_is_refused(load, options) -> None:
    with pytest.raises(UsageError):
        load(FakeSession(), LoadOptions(device="cuda", **options))


def test_what_preloading_prints_does_not_mix_with_results(load, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load x"), raising=False)
    load(FakeSession()).close()
    assert capsys.readouterr() == ("", "Failed to load x\n")


def test_fp16_is_refused_on_the_cpu(tmp_path) -> None:
    with pytest.raises(PrecisionMissing, match="fp16 is for an NVIDIA GPU"):
        onnxruntime.load(tmp_path / "toy.onnx", LoadOptions(precision="fp16"))


# TensorRT as the provider.

TENSORRT = LoadOptions(device="cuda", provider="tensorrt", precision="fp16")
BOTH = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


class TensorRtSession(FakeSession):
    """Gives `taken` nodes to TensorRT, and a shape to CUDA."""

    taken = (NODE,)

    def get_provider_graph_assignment_info(self):
        mine = SimpleNamespace(ep_name=BOTH[0], get_nodes=lambda: list(self.taken))
        return [mine, *super().get_provider_graph_assignment_info()]


@pytest.fixture
def tensorrt(load, monkeypatch):
    """An onnxruntime that was built for TensorRT 10, of which `version` is installed."""

    def there(version="10.14.1", libraries=("libnvinfer.so.10", "libcudart.so.13"), loads=True):
        monkeypatch.setattr(onnxruntime_tensorrt, "needed", lambda path: tuple(libraries))
        monkeypatch.setattr(onnxruntime_tensorrt, "installed", lambda: version)
        monkeypatch.setattr(onnxruntime_tensorrt, "_load", lambda name: loads)

    there()
    return there


def test_tensorrt_is_asked_first_and_cuda_takes_what_it_leaves(load, tensorrt) -> None:
    session = TensorRtSession(providers=BOTH)
    with load(session, TENSORRT) as runner:
        assert np.allclose(runner.run(pixels(2))["logits"], sums(pixels(2)), atol=1e-3)
    assert list(load.providers) == list(BOTH[:2])
    assert load.providers[BOTH[0]]["trt_fp16_enable"] == "1"
    assert load.providers[BOTH[1]]["enable_cuda_graph"] == "0"
    assert set(session.graphs) == {"-1"}


def test_engines_of_the_provider_are_kept_where_there_is_a_place(load, tensorrt, tmp_path) -> None:
    load(TensorRtSession(providers=BOTH), replace(TENSORRT, cache=tmp_path)).close()
    assert load.providers[BOTH[0]]["trt_engine_cache_path"] == str(tmp_path)


@pytest.mark.parametrize("taken", [(), (NODE,)])
def test_a_session_that_leaves_tensorrt_out_is_refused(load, tensorrt, taken) -> None:
    session = TensorRtSession(providers=BOTH[1:] if taken else BOTH)
    session.taken = taken
    told = "GPU by TensorrtExecutionProvider" if taken else "not a single node"
    with pytest.raises(RunnerError, match=told):
        load(session, TENSORRT)


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"version": "11.4.0"}, r"takes TensorRT 10, and 11\.4\.0 is installed\. Run: pip install"),
        ({"version": None, "loads": False}, r'libnvinfer\.so\.10, .* "tensorrt>=10,<11"'),
        ({"libraries": ()}, "this package has no TensorRT provider"),
    ],
)
def test_another_tensorrt_than_it_was_built_for_is_refused(load, tensorrt, there, told) -> None:
    tensorrt(**there)
    with pytest.raises(BackendMissing, match=told):
        load(TensorRtSession(providers=BOTH), TENSORRT)
    assert load.opened == []


def test_a_library_is_loaded_from_where_wheels_keep_it(monkeypatch, tmp_path) -> None:
    (tmp_path / "tensorrt_libs").mkdir()
    (tmp_path / "tensorrt_libs" / "__init__.py").touch()
    (tmp_path / "tensorrt_libs" / "libnvinfer.so.10").touch()
    monkeypatch.syspath_prepend(tmp_path)
    tried = []

    def load(name, mode):
        tried.append(name)
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", load)
    assert not onnxruntime_tensorrt._load("libnvinfer.so.10")
    wheel = tmp_path / "tensorrt_libs" / "libnvinfer.so.10"
    assert tried == [str(wheel), "libnvinfer.so.10"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"provider": "tensorrt"}, "Add --device cuda"), ({"provider": "tenosrrt"}, "Did you mean")],
)
def test_a_provider_is_one_of_a_gpu(fields, told) -> None:
    with pytest.raises(UsageError, match=told):
        LoadOptions(**fields)


def test_other_targets_have_no_provider(tmp_path) -> None:
    with pytest.raises(UsageError, match="eager: has no --provider, onnxruntime alone has"):
        load_unchecked("eager", tmp_path, TENSORRT)
