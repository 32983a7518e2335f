"""The runner of engines against a TensorRT and a CUDA that are made up: they have no GPU.

What runs here is which profile, which shapes and whose memory; that it computes the network is
tested where a GPU is.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from coat_deploy.backends import cuda, tensorrt_run
from coat_deploy.backends.tensorrt_flavour import TENSORRT, TENSORRT_RTX
from coat_deploy.engine import EngineRecord, Profile
from coat_deploy.errors import CorruptArtifact, DeviceMissing, RunnerError, UsageError
from coat_deploy.runner import LoadOptions

SMALL, LARGE = Profile.of((1, 1, 2), (8, 8)), Profile.of((4, 6, 8), (8, 8))


class FakeStream:
    handle = 7

    def wait(self):
        pass

    def capture(self, work):
        work()
        return FakeGraph(work)

    def close(self):
        pass


class FakeGraph:
    launches = 0

    def __init__(self, work):
        self.work = work

    def launch(self, stream):
        FakeGraph.launches += 1
        self.work()

    def close(self):
        pass


class FakeBuffer:
    live: dict[int, "FakeBuffer"] = {}

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.address = tuple(shape), dtype, id(self)
        self.values = np.full(shape, np.nan, dtype)
        self.live[self.address] = self

    def put(self, values, stream):
        self.values[: len(values)] = values

    def put_device(self, address, count, stream):
        self.values.ravel()[: count // 4] = FakeDeviceTensor.there[address].ravel()

    def get(self, shape, stream):
        return self.values[: shape[0]].copy()

    def close(self):
        del self.live[self.address]


class FakeDeviceTensor:
    """What a tensor on a GPU offers; it has no way to the host."""

    there: dict[int, np.ndarray] = {}

    def __init__(self, values):
        self.values, self.shape, self.strides = values, values.shape, None
        self.there[id(values)] = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        return FakeDeviceTensor(self.values[key])

    @property
    def __cuda_array_interface__(self):
        typestr, data = self.values.dtype.str, (id(self.values), False)
        return {"shape": self.shape, "typestr": typestr, "data": data, "strides": self.strides}


class FakeContext:
    def __init__(self, engine):
        self.engine, self.addresses, self.shape, self.profile = engine, {}, None, None

    def set_optimization_profile_async(self, index, stream):
        self.profile = self.engine.profiles[index]

    def set_input_shape(self, name, shape):
        assert self.profile.takes(shape), (self.profile, shape)
        self.shape = shape

    def get_tensor_shape(self, name):
        return (self.shape[0], 2)

    def set_tensor_address(self, name, address):
        self.addresses[name] = FakeBuffer.live[address]

    def execute_async_v3(self, stream):
        """Sum and largest of each image."""
        self.engine.shapes.append(self.shape)
        pixels = self.addresses["pixels"].values.reshape(self.shape[0], -1)
        self.addresses["logits"].values[:] = np.stack([pixels.sum(1), pixels.max(1)], 1)
        return not self.engine.fails


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, *profiles):
        self.profiles, self.shapes, self.fails = profiles, [], False
        self.num_optimization_profiles = len(profiles)

    def get_tensor_name(self, index):
        return ("pixels", "logits")[index]

    def get_tensor_shape(self, name):
        sides = {(p.height, p.width) for p in self.profiles}
        open_size = len(sides) > 1 or any(a[0] != a[2] for side in sides for a in side)
        image = (-1, 3, -1, -1) if open_size else (-1, 3, 8, 8)
        return image if name == "pixels" else (-1, 2)

    def get_tensor_dtype(self, name):
        return np.float32

    def get_tensor_profile_shape(self, name, index):
        return self.profiles[index].shapes()

    def create_execution_context(self):
        return FakeContext(self)


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    FakeBuffer.live.clear()
    monkeypatch.setattr(cuda, "problem", lambda: None)
    device = cuda.Device("NVIDIA Test", "9.0", "13.0")
    monkeypatch.setattr(cuda, "device", lambda: device)
    monkeypatch.setattr(cuda, "Stream", FakeStream)
    monkeypatch.setattr(cuda, "Buffer", FakeBuffer)


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Load an engine of some profiles."""

    def load(*profiles, **options):
        engine = FakeEngine(*profiles)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
        severities = dict(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)
        logger = type("ILogger", (), {"Severity": SimpleNamespace(**severities)})
        trt = SimpleNamespace(
            Runtime=lambda logger: runtime, ILogger=logger, nptype=np.dtype, __version__="11.4.0"
        )
        monkeypatch.setattr(type(TENSORRT), "load", lambda self: trt)
        path = tmp_path / "toy.engine"
        path.write_bytes(b"plan")
        return tensorrt_run.load(TENSORRT, path, LoadOptions(**options))

    return load


def pixels(batch, size=(8, 8)):
    return np.random.default_rng(batch).standard_normal((batch, 3, *size), np.float32)


def expected(x):
    flat = x.reshape(len(x), -1)
    return np.stack([flat.sum(1), flat.max(1)], 1)


def close(a, b):
    return a.shape == b.shape and np.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        (1, {(1, 3, 8, 8)}),
        (2, {(2, 3, 8, 8)}),
        (3, {(4, 3, 8, 8)}),  # filled up to the least of the large profile
        (8, {(8, 3, 8, 8)}),
        (19, {(8, 3, 8, 8), (4, 3, 8, 8)}),
    ],
)
def test_every_batch_goes_through_a_profile_that_takes_it(load, batch, shapes) -> None:
    x = pixels(batch)
    with load(SMALL, LARGE) as runner:
        assert close(runner.run(x)["logits"], expected(x))
        assert set(runner._engine.shapes) == shapes


def test_of_profiles_that_take_a_batch_the_one_made_for_it_is_chosen(load) -> None:
    with load(Profile.of((1, 8, 8), (8, 8)), Profile.of((1, 2, 8), (8, 8))) as runner:
        assert runner._choose((2, 3, 8, 8)) == (1, 2)
        assert runner._choose((7, 3, 8, 8)) == (0, 7)


def test_a_static_engine_takes_any_batch(load) -> None:
    with load(Profile.of((4, 4, 4), (8, 8))) as runner:
        for batch in (1, 4, 6):
            assert close(runner.run(pixels(batch))["logits"], expected(pixels(batch)))
        assert set(runner._engine.shapes) == {(4, 3, 8, 8)}


def test_the_runner_describes_itself(load) -> None:
    with load(SMALL) as runner:
        assert runner.target == "tensorrt"
        assert runner.inputs[0].shape == ("?", 3, 8, 8)
        assert runner.outputs[0].shape == ("?", 2)
    with load(Profile((1, 1, 2), (8, 8, 16), (8, 8, 16))) as runner:
        assert runner.inputs[0].shape == ("?", 3, "?", "?")


def test_an_image_outside_all_profiles_is_refused_with_them(load) -> None:
    with load(Profile((1, 1, 2), (32, 32, 64), (32, 32, 64))) as runner:
        with pytest.raises(RunnerError, match=r"no profile takes images of \(96, 32\) \(there: ba"):
            runner.run(pixels(1, (96, 32)))
        with pytest.raises(RunnerError, match="W >= 32"):
            runner.run(pixels(1, (32, 8)))


def test_a_shape_is_prepared_once_and_launched_as_a_graph(load) -> None:
    FakeGraph.launches = 0
    with load(SMALL, LARGE) as runner:
        for _ in range(3):
            runner.run(pixels(2))
        assert FakeGraph.launches == 3
        assert len(FakeBuffer.live) == 2


def test_shapes_beyond_the_most_make_room_and_all_memory_is_freed(load) -> None:
    with load(Profile.of((1, 1, 64), (8, 8))) as runner:
        for batch in range(1, 20):
            runner.run(pixels(batch))
        assert len(FakeBuffer.live) == 2 * tensorrt_run.MAX_LANES
    assert not FakeBuffer.live


def test_tensors_on_the_gpu_are_taken_as_they_are(load) -> None:
    x = pixels(2)
    with load(SMALL) as runner:
        assert close(runner.run(FakeDeviceTensor(x))["logits"], expected(x))


def test_tensors_on_the_gpu_that_would_be_copied_wrong_are_refused(load) -> None:
    half, turned = FakeDeviceTensor(pixels(2).astype(np.float16)), FakeDeviceTensor(pixels(2))
    turned.strides = (4, 8, 16, 32)
    with load(SMALL) as runner:
        for tensor in (half, turned, FakeDeviceTensor(pixels(2)[:, :1])):
            with pytest.raises(RunnerError, match="tensorrt: the tensor does not fit"):
                runner.run(tensor)


def test_a_bound_step_computes_into_memory_of_its_own(load) -> None:
    with load(SMALL, LARGE) as runner:
        first, second = runner.bind(pixels(2)), runner.bind(pixels(8))
        (lane,), (other,) = first(), second()
        assert close(lane._buffers["logits"].values, expected(pixels(2)))
        assert close(other._buffers["logits"].values, expected(pixels(8)))


def test_streams_run_at_once_each_with_lanes_of_its_own(load, at_once) -> None:
    with load(Profile.of((1, 1, 8), (8, 8)), streams=3, threads=3) as runner:
        calls = [lambda b=b: runner.run(pixels(b)) for b in (1, 2, 3)]
        for batch, got in zip((1, 2, 3), at_once(*calls), strict=True):
            assert all(close(values["logits"], expected(pixels(batch))) for values in got)


def test_an_engine_that_fails_says_so_and_leaves_the_runner_usable(load) -> None:
    with load(SMALL) as runner:
        runner.run(pixels(1))
        runner._engine.fails = True
        for batch in (1, 2):  # one that is ready, and one that is not
            with pytest.raises(RunnerError, match="tensorrt: the engine failed"):
                runner.run(pixels(batch))
        assert len(FakeBuffer.live) == 2
        runner._engine.fails = False
        assert close(runner.run(pixels(1))["logits"], expected(pixels(1)))


def test_without_a_gpu_nothing_is_touched(load, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "problem", lambda: "there is no NVIDIA driver")
    with pytest.raises(DeviceMissing, match=r"toy\.engine: TensorRT needs an NVIDIA GPU, and ther"):
        load(SMALL)


def test_a_plan_that_is_not_taken_is_corrupt(load, tmp_path) -> None:
    load(SMALL)
    refusing = SimpleNamespace(deserialize_cuda_engine=lambda plan: None)
    TENSORRT.load().Runtime = lambda logger: refusing
    with pytest.raises(CorruptArtifact, match=r"toy\.engine: TensorRT 11\.4\.0 does not take it"):
        tensorrt_run.load(TENSORRT, tmp_path / "toy.engine", LoadOptions())


def test_a_gpu_that_a_flavour_is_not_for_is_told(load, tmp_path) -> None:
    load(SMALL)

    def refusing(logger):
        def deserialize(plan):
            told = "The engine cannot run on this GPU. TensorRT-RTX does not support this compute"
            logger.log(1, f"{told} capability, so the engine cannot be rebuilt for it.")

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    trt = TENSORRT.load()
    trt.Runtime = refusing
    trt.ILogger.__init__ = lambda self: None
    with pytest.raises(RunnerError, match=r"NVIDIA Test, of compute capability 9\.0\. Export it"):
        tensorrt_run.load(TENSORRT, tmp_path / "toy.engine", LoadOptions())


def test_inner_tensors_are_not_to_be_had(load) -> None:
    with pytest.raises(UsageError, match="no inner tensors"):
        load(SMALL, taps=("serial_blocks1.0.image",))


# What an engine is for

RECORD = EngineRecord("tensorrt", "11.4.0", "NVIDIA Test", "9.0", "0" * 64, (SMALL,))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"flavour": "tensorrt-rtx"}, "it is of tensorrt-rtx, not of tensorrt"),
        ({"version": "10.16.1"}, "it was built by TensorRT 10.16.1, and 11.4.0 is installed"),
        ({"version": "10.16.1", "options": {"version_compatible": True}}, None),
        (
            {"compute_capability": "8.9", "gpu": "NVIDIA L4"},
            "it was built on NVIDIA L4 for compute capability 8.9, and this GPU, NVIDIA Test, "
            "has 9.0",
        ),
        ({"compute_capability": "8.9", "options": {"hardware_compatible": True}}, None),
        ({"gpu": "NVIDIA H100"}, None),  # of the same compute capability
    ],
)
def test_an_engine_says_in_what_a_machine_differs(load, change, reason) -> None:
    load(SMALL)
    assert tensorrt_run.mismatch(TENSORRT, dataclasses.replace(RECORD, **change)) == reason


def test_an_engine_built_ahead_of_time_is_for_the_gpus_that_were_named(load) -> None:
    load(SMALL)
    record = dataclasses.replace(RECORD, flavour="tensorrt-rtx", gpu=None, compute_capability=None)
    assert tensorrt_run.mismatch(TENSORRT_RTX, record) is None
    named = dataclasses.replace(record, options={"compute_capabilities": ["8.6", "8.9"]})
    reason = tensorrt_run.mismatch(TENSORRT_RTX, named)
    assert reason is not None and "for compute capability 8.6, 8.9, and this GPU" in reason
