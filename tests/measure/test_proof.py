import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest

from coat_deploy.errors import BelowBar, CorruptArtifact, RunnerError, UsageError
from coat_deploy.measure import proof as proof_module
from coat_deploy.measure.bar import BARS, Bar
from coat_deploy.measure.proof import Proof, make_proof, probe_images, replay
from coat_deploy.runner import TensorSpec
from coat_deploy.spec import Preprocess

SIZE = (16, 24)
DIGEST = "ab" * 32
WEIGHTS = np.random.Generator(np.random.PCG64(3)).normal(0, 5, (3 * 4, 10)).astype(np.float32)


class FakeRunner:
    """A network of one matrix on pooled pixels; `change` alters its logits."""

    target = "fake"
    outputs = (TensorSpec("logits", "float32", ("batch", 10)),)

    def __init__(self, change=lambda logits: logits, batch="batch"):
        self.change = change
        self.inputs = (TensorSpec("pixels", "float32", (batch, 3, "height", "width")),)
        self.batches = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, pixels):
        self.batches.append(len(pixels))
        b, _, h, w = pixels.shape
        pooled = pixels.reshape(b, 3, 2, h // 2, 2, w // 2).mean(axis=(3, 5)).reshape(b, -1)
        return {"logits": self.change(pooled @ WEIGHTS)}

    def bind(self, pixels):
        return lambda: self.run(pixels)


def made(precision="fp32", count=2, **changes):
    proof = make_proof(FakeRunner(), Preprocess(SIZE), SIZE, DIGEST, BARS[precision], count=count)
    return dataclasses.replace(proof, **changes)


def archive(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def members_of(proof):
    with zipfile.ZipFile(io.BytesIO(proof.to_bytes())) as source:
        return {name: source.read(name) for name in source.namelist()}


def test_what_made_the_proof_reproduces_it():
    found = replay(made(), FakeRunner())
    assert found.images == 2
    assert found.max_abs_difference == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_runner_that_returns_nan_does_not_reproduce_it(precision):
    with pytest.raises(BelowBar, match="NaN or infinite"):
        replay(made(precision), FakeRunner(lambda logits: logits * np.float32(np.nan)))


def test_a_runner_slightly_off_is_refused_in_fp32_and_not_in_bf16():
    off = FakeRunner(lambda logits: logits + np.float32(0.01) * np.arange(10, dtype=np.float32))
    with pytest.raises(BelowBar, match=r"m\.onnx: .*max \|delta\| is 0\.09.*Export the model"):
        replay(made("fp32"), off, "m.onnx")
    assert replay(made("bf16"), off).max_abs_difference == pytest.approx(0.09, rel=1e-3)


@pytest.mark.parametrize("precision", BARS)
def test_logits_of_another_network_are_refused_in_every_precision(precision):
    with pytest.raises(BelowBar):
        replay(made(precision), FakeRunner(lambda logits: logits[:, ::-1]))


def test_a_bar_of_shares_alone_still_refuses_another_network():
    proof = make_proof(FakeRunner(), Preprocess(SIZE), SIZE, DIGEST, Bar(min_top1_agreement=0.9))
    with pytest.raises(BelowBar, match="centred cosine"):
        replay(proof, FakeRunner(lambda logits: logits[:, ::-1]))


@pytest.mark.parametrize(("batch", "ran"), [(1, [1, 1, 1]), (2, [2, 2]), (4, [4])])
def test_a_runner_of_a_fixed_batch_gets_that_batch(batch, ran):
    runner = FakeRunner(batch=batch)
    assert replay(made(count=3), runner).images == 3
    assert runner.batches == ran


def test_bytes_are_read_back_equal():
    proof = made()
    other = Proof.from_bytes(proof.to_bytes())
    assert np.array_equal(other.pixels, proof.pixels)
    assert np.array_equal(other.outputs["logits"], proof.outputs["logits"])
    assert (other.mean, other.std, other.bar) == (proof.mean, proof.std, proof.bar)
    assert other.artifact_sha256 == DIGEST
    assert replay(other, FakeRunner()).max_abs_difference == 0


def test_equal_proofs_are_equal_bytes():
    assert made().to_bytes() == made().to_bytes()
    assert Proof.from_bytes(made().to_bytes()).to_bytes() == made().to_bytes()


def test_numpy_opens_the_file_without_pickle():
    with np.load(io.BytesIO(made().to_bytes()), allow_pickle=False) as arrays:
        assert arrays["output.logits"].shape == (2, 10)


def test_feature_maps_are_kept_by_name():
    maps = np.random.Generator(np.random.PCG64(0)).normal(0, 1, (2, 4, 3, 3)).astype(np.float32)
    proof = Proof.from_bytes(made(outputs={"x1": maps, "x2": maps + 1}).to_bytes())
    assert list(proof.outputs) == ["x1", "x2"]
    assert np.array_equal(proof.outputs["x2"], maps + 1)


def test_the_digest_of_another_artifact_is_refused():
    made().matches(DIGEST)
    with pytest.raises(CorruptArtifact, match=r"m\.onnx: .*got sha256 cdcdcdcdcdcd, .*abababab"):
        made().matches("cd" * 32, "m.onnx")


def test_a_truncated_proof_is_corrupt_wherever_it_ends():
    data = made().to_bytes()
    for end in range(0, len(data) - 1, 97):
        with pytest.raises(CorruptArtifact, match=r"m\.proof: not a readable proof"):
            Proof.from_bytes(data[:end], "m.proof")


def test_a_flipped_bit_is_noticed_or_changes_nothing():
    proof = made()
    data = proof.to_bytes()
    noticed = 0
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        try:
            other = Proof.from_bytes(bytes(broken))
        except CorruptArtifact:
            noticed += 1
        else:  # a date or an attribute in the archive's own records
            assert other.to_bytes() == data
    assert noticed > len(data) / 7 * 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meta.npy": npy(np.array([{"a": 1}], dtype=object))}, "object"),
        ({"meta.npy": npy(np.frombuffer(b"[1]", dtype=np.uint8))}, "not a readable proof"),
        ({"pixels.npy": npy(np.zeros((2, 3, 4, 4), dtype=np.float32))}, "pixels are float32"),
        ({"pixels.npy": npy(np.zeros((2, 1, 4, 4), dtype=np.uint8))}, "pixels are uint8"),
        ({"pixels.npy": npy(np.zeros((99, 3, 4, 4), dtype=np.uint8))}, r"\[99, 3, 4, 4\]"),
        ({"pixels.npy": npy(np.uint8(0))}, "not a readable proof"),
        ({"output.logits.npy": npy(np.zeros((3, 10), dtype=np.float32))}, r"\[3, 10\]"),
        ({"output.logits.npy": npy(np.full((2, 4), np.nan, dtype=np.float32))}, "NaN"),
        ({"output.logits.npy": npy(np.zeros((2, 10), dtype=np.float64))}, "float64"),
        ({f"output.{k}.npy": b"" for k in range(9)}, "members"),
    ],
)
def test_content_that_is_not_a_proof_is_corrupt(change, message):
    with pytest.raises(CorruptArtifact, match=message):
        Proof.from_bytes(archive(members_of(made()) | change))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("artifact_sha256", 5),
        ("mean", [0.5]),
        ("std", [0.2, 0.0, 0.2]),
        ("mean", [0.1, 0.2, float("nan")]),
        ("bar", {"min_top1_agreement": 7}),
        ("bar", {"unheard_of": 1.0}),
        ("bar", {"max_abs_difference": "1"}),
        ("bar", None),
    ],
)
def test_a_header_that_cannot_be_is_corrupt(key, value):
    members = members_of(made())
    meta = json.loads(np.load(io.BytesIO(members["meta.npy"])).tobytes()) | {key: value}
    members["meta.npy"] = npy(np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8))
    with pytest.raises(CorruptArtifact):
        Proof.from_bytes(archive(members))


@pytest.mark.parametrize("lacking", ["meta.npy", "pixels.npy", "output.logits.npy"])
def test_a_missing_member_is_corrupt(lacking):
    members = members_of(made())
    del members[lacking]
    with pytest.raises(CorruptArtifact, match="it holds no"):
        Proof.from_bytes(archive(members))


def test_an_array_that_claims_more_than_it_holds_is_not_allocated():
    members = members_of(made())
    header = members["pixels.npy"].replace(b"(2, 3, 16, 24), }", b"(9999999999999,)}")
    assert header != members["pixels.npy"]
    with pytest.raises(CorruptArtifact, match="has 2304 bytes"):
        Proof.from_bytes(archive(members | {"pixels.npy": header}))


def test_a_compressed_file_is_refused():
    data = archive(members_of(made()) | {"zeros.npy": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptArtifact, match="compressed"):
        Proof.from_bytes(data)


def test_a_file_too_large_is_refused_unread(monkeypatch):
    data = made().to_bytes()
    monkeypatch.setattr(proof_module, "MAX_BYTES", len(data) - 1)
    with pytest.raises(CorruptArtifact, match="at most"):
        Proof.from_bytes(data)


def test_outputs_too_large_for_a_proof_are_refused(monkeypatch):
    monkeypatch.setattr(proof_module, "MAX_BYTES", 4096)
    with pytest.raises(UsageError, match="size 16x24 are too large"):
        made()


def test_a_reference_that_returns_nan_proves_nothing():
    broken = FakeRunner(lambda logits: logits * np.float32(np.inf))
    with pytest.raises(RunnerError, match="'logits' holds NaN or infinity"):
        make_proof(broken, Preprocess(SIZE), SIZE, DIGEST, BARS["fp32"])


def test_normalised_pixels_are_the_networks_input():
    preprocess = Preprocess(SIZE)
    proof = made()
    expected = (proof.pixels[1, 2, 3, 4] / 255 - preprocess.mean[2]) / preprocess.std[2]
    assert proof.normalised().dtype == np.float32
    assert proof.normalised()[1, 2, 3, 4] == pytest.approx(expected, rel=1e-5)


def test_probe_images_are_the_same_for_a_seed_and_differ_within():
    first, second = probe_images((64, 48), 2), probe_images((64, 48), 2)
    assert np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, probe_images((64, 48), 2, seed=1))


def test_probe_images_are_like_photographs():
    for image in probe_images((128, 96), 4).astype(float):
        assert 20 < image.std() < 110
        steps = np.abs(np.diff(image, axis=-1))
        assert np.median(steps) < 15  # mostly smooth: noise has 60 or more
        assert np.quantile(steps, 0.999) > 25  # and edges


def test_a_proof_of_the_published_size_is_small():
    proof = make_proof(FakeRunner(), Preprocess((224, 224)), (224, 224), DIGEST, BARS["fp32"])
    assert len(proof.to_bytes()) < 310_000
