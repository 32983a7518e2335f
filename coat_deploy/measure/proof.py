"""The proof that travels: probe inputs and the eager outputs, bound to one artifact.

Beside every artifact lies a small file that lets any machine ask, without PyTorch, without the
weights and without photographs: does this artifact, on this CPU and this runtime, still compute
what the eager network computed? A miscompiled engine, kernels of another CPU that saturate, or a
truncated file answer no.

The file is an uncompressed `.npz` (`numpy.load` opens it) with fixed times and order, so equal
proofs are equal bytes. It may come from a stranger: no pickle, every size is checked before
anything is allocated, and whatever is not as written raises `CorruptArtifact`.
"""

import dataclasses
import io
import json
import math
import struct
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from coat_deploy.errors import BelowBar, CorruptArtifact, RunnerError, UsageError
from coat_deploy.images import normalise
from coat_deploy.measure.agreement import Agreement, AgreementMeter
from coat_deploy.measure.bar import Bar
from coat_deploy.runner import Array, Pixels, Runner
from coat_deploy.spec import MAX_SIDE, Preprocess, Size, format_size

FORMAT = 1
MAX_BYTES = 256 << 20
"""Largest proof written or read. Two images of 224 px and their logits take 0.3 MB, of 384 px
with the widest network's feature maps 17 MB."""
MAX_IMAGES = 16
_MAX_MEMBERS = 8
# numpy reads a header by `ast.literal_eval`, whose depth CPython 3.11 counts for all threads
# together: two at once end in a SystemError now and then, and a server reads several proofs.
_ONE_HEADER = threading.Lock()
_Bytes = npt.NDArray[np.uint8]
_Colour = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Proof:
    """What an artifact must reproduce.

    `pixels` (n, 3, H, W) uint8 RGB; the network's input is (pixels / 255 - mean) / std.
    `outputs`: the eager network's outputs by name, float32, first dimension n.
    `bar`: what a replay is held against, as `make_proof` chose it.
    """

    pixels: _Bytes
    mean: _Colour
    std: _Colour
    outputs: Mapping[str, Array]
    artifact_sha256: str
    bar: Bar

    def normalised(self) -> Pixels:
        """Return the network's input, (n, 3, H, W) float32; bit-equal on every machine."""
        return normalise(self.pixels, self.mean, self.std)

    def matches(self, sha256: str, subject: str = "artifact") -> None:
        """Return if the proof belongs to the artifact of that digest.

        Raises: CorruptArtifact when it belongs to another.
        """
        if sha256 != self.artifact_sha256:
            raise CorruptArtifact(
                f"{subject}: is not the file its proof was made for (got sha256 {sha256[:12]}, "
                f"expected {self.artifact_sha256[:12]}). Export the model again."
            )

    def to_bytes(self) -> bytes:
        """Return the file's content; equal proofs give equal bytes."""
        meta = {
            "format": FORMAT,
            "artifact_sha256": self.artifact_sha256,
            "mean": self.mean,
            "std": self.std,
            "bar": self.bar.to_json(),
        }
        text = json.dumps(meta, sort_keys=True).encode()
        arrays: dict[str, npt.NDArray[Any]] = {
            "meta": np.frombuffer(text, dtype=np.uint8),
            "pixels": self.pixels,
        }
        arrays |= {f"output.{name}": self.outputs[name] for name in sorted(self.outputs)}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                member.create_system = 3  # the same on every system
                content = io.BytesIO()
                np.lib.format.write_array(
                    content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False
                )
                archive.writestr(member, content.getvalue())
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, subject: str = "proof") -> "Proof":
        """Read a file's content; `subject` names it in errors.

        Raises: CorruptArtifact when it is not a whole, sound proof.
        """
        try:
            return _read(data)
        except (
            ValueError, TypeError, LookupError, AttributeError, OverflowError, EOFError, OSError,
            SyntaxError, MemoryError, RuntimeError, struct.error, zipfile.BadZipFile, UsageError,
        ) as error:  # fmt: skip
            # What zipfile, numpy and json raise on damaged input.
            raise CorruptArtifact(
                f"{subject}: not a readable proof ({error}). Export the model again."
            ) from error


def make_proof(
    reference: Runner,
    preprocess: Preprocess,
    size: Size,
    artifact_sha256: str,
    bar: Bar,
    seed: int = 0,
    count: int = 2,
) -> Proof:
    """Run `count` probe images of `size` through `reference` and keep inputs and outputs.

    `bar` is the artifact's; the proof keeps `bar.for_few_images()`. On two images a share of
    equal classes says nothing, and bf16 and int8 round differently from one CPU to the next, so a
    replay judges differences and the cosine, with room for that.
    Raises: RunnerError when the reference fails or returns NaN or infinity; UsageError when the
    outputs are too large for a proof.
    """
    assert 1 <= count <= MAX_IMAGES
    pixels = probe_images(size, count, seed)
    proof = Proof(pixels, preprocess.mean, preprocess.std, {}, artifact_sha256, _replay_bar(bar))
    found = reference.run(proof.normalised())
    outputs = {
        spec.name: np.ascontiguousarray(found[spec.name], dtype=np.float32)
        for spec in reference.outputs
    }
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise RunnerError(
                f"{reference.target}: '{name}' holds NaN or infinity on the probe images. "
                "Check the weights: nothing can be proven against such a network."
            )
    total = pixels.nbytes + sum(value.nbytes for value in outputs.values())
    if total > MAX_BYTES // 2:
        raise UsageError(
            f"proof: outputs at size {format_size(size)} are too large (got {total >> 20} MiB, "
            f"expected {MAX_BYTES >> 21} at most). Make the proof at a smaller size."
        )
    return dataclasses.replace(proof, outputs=outputs)


def _replay_bar(bar: Bar) -> Bar:
    """Return the bar without shares of classes, which may have been all it had."""
    few = bar.for_few_images()
    limits = (few.max_abs_difference, few.max_relative_l2, few.min_centred_cosine)
    # Far below any precision's bar, far above what a broken artifact reaches.
    return few if any(v is not None for v in limits) else few.override(min_centred_cosine=0.9)


def replay(proof: Proof, runner: Runner, subject: str | None = None) -> Agreement:
    """Run the probe images through `runner` and hold its outputs against the eager ones.

    A runner of a fixed batch size gets the images in batches of that size, the last image
    repeated to fill the last batch.
    Raises: BelowBar with the figures when it does not reproduce them; RunnerError when it fails.
    """
    pixels = proof.normalised()
    declared = runner.inputs[0].shape[0]
    batch = declared if isinstance(declared, int) and declared > 0 else len(pixels)
    meter = AgreementMeter()
    for start in range(0, len(pixels), batch):
        part = pixels[start : start + batch]
        filler = np.repeat(part[-1:], batch - len(part), axis=0)
        found = runner.run(np.concatenate([part, filler]))
        meter.add(
            {name: value[start : start + batch] for name, value in proof.outputs.items()},
            {name: value[: len(part)] for name, value in found.items()},
            [f"probe {start + k}" for k in range(len(part))],
        )
    agreement = meter.agreement()
    failures = proof.bar.failures(agreement)
    if failures:
        raise BelowBar(
            f"{subject or runner.target}: does not reproduce the eager network's outputs on this "
            f"machine: {' '.join(failures)} Got {agreement.summary()}. Export the model again on "
            "this machine, or use another target or a wider precision here."
        )
    return agreement


def probe_images(size: Size, count: int, seed: int = 0) -> _Bytes:
    """Return synthetic images (count, 3, H, W) uint8 with the statistics a network looks for.

    Smooth colour fields (low frequencies), shapes with hard edges, a grating as texture, and a
    little grain. Noise alone would leave a network's later layers almost constant.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    return np.stack([_probe_image(size, random) for _ in range(count)])


def _probe_image(size: Size, random: np.random.Generator) -> _Bytes:
    y, x = np.meshgrid(*(np.linspace(0, 1, side) for side in size), indexing="ij")
    image = np.empty((3, *size))
    for channel in image:
        waves = random.uniform((0.5, 0.5, 0, 0.1), (2.5, 2.5, 2 * np.pi, 0.3), size=(3, 4))
        channel[:] = random.uniform(0.3, 0.7)
        for fy, fx, phase, height in waves:
            channel += height * np.sin(2 * np.pi * (fy * y + fx * x) + phase)
    for _ in range(4):  # ellipses, edges of every direction
        cy, cx, ry, rx = random.uniform((0.1, 0.1, 0.08, 0.08), (0.9, 0.9, 0.3, 0.3))
        inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        image[:, inside] = 0.3 * image[:, inside] + 0.7 * random.uniform(0, 1, (3, 1))
    # A grating of about six pixels a period fills a band; its contrast fades across the image.
    angle, phase = random.uniform(0, np.pi), random.uniform(0, 2 * np.pi)
    along = np.cos(angle) * y * size[0] + np.sin(angle) * x * size[1]
    band = (np.abs(y - random.uniform(0.3, 0.7)) < 0.15) * (0.3 + 0.7 * x)
    image += 0.2 * band * np.sin(along + phase)
    image += random.normal(0, 0.02, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def _read(data: bytes) -> Proof:
    """Read and check a proof; raises any of the errors that `Proof.from_bytes` translates."""
    arrays = _arrays(data)
    for name in ("meta", "pixels"):
        if name not in arrays:
            raise ValueError(f"it holds no {name}")
    meta = json.loads(arrays.pop("meta").tobytes())
    if meta["format"] != FORMAT:
        raise ValueError(f"format {meta['format']!r}, expected {FORMAT}")
    pixels = arrays.pop("pixels")
    n, sides = pixels.shape[0], pixels.shape[2:]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}")
    if not 1 <= n <= MAX_IMAGES or not all(1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"pixels have the shape {list(pixels.shape)}")
    outputs = {name.removeprefix("output."): array for name, array in arrays.items()}
    for name, array in outputs.items():
        if array.dtype != np.float32 or array.ndim < 2 or len(array) != n or not array.size:
            raise ValueError(f"output {name} is {array.dtype} {list(array.shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"output {name} holds NaN or infinity")
    if not outputs:
        raise ValueError("it holds no outputs")
    digest = meta["artifact_sha256"]
    if not isinstance(digest, str):
        raise ValueError("the artifact's digest is missing")
    mean, std = _colour(meta["mean"]), _colour(meta["std"])
    if min(std) <= 0:
        raise ValueError("std is not above 0")
    return Proof(pixels, mean, std, outputs, digest, Bar().override(**meta["bar"]))


def _colour(value: Any) -> _Colour:
    red, green, blue = (float(v) for v in value)
    if not all(math.isfinite(v) for v in (red, green, blue)):
        raise ValueError("mean or std is not finite")
    return (red, green, blue)


def _arrays(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an uncompressed `.npz` by name, nothing larger than the file itself."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes, expected {MAX_BYTES} at most")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS:
            raise ValueError(f"{len(members)} members, expected {_MAX_MEMBERS} at most")
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError("it is compressed")
        if sum(m.file_size for m in members) > len(data):
            raise ValueError("its members are larger than the file")
        # Reading compares each member with its CRC-32.
        return {m.filename.removesuffix(".npy"): _array(archive.read(m)) for m in members}


def _array(content: bytes) -> npt.NDArray[Any]:
    """Read a `.npy` of format 1.0 that holds uint8 or float32 values, without copying them."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array is not of .npy format 1.0")
    with _ONE_HEADER:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    values = content[stream.tell() :]
    if dtype not in (np.dtype(np.uint8), np.dtype("<f4")) or fortran:
        raise ValueError(f"an array is {dtype}{' in Fortran order' if fortran else ''}")
    if math.prod(shape) * dtype.itemsize != len(values) or min(shape, default=0) < 0:
        raise ValueError(f"an array of shape {list(shape)} has {len(values)} bytes")
    return cast("npt.NDArray[Any]", np.frombuffer(values, dtype=dtype).reshape(shape))
