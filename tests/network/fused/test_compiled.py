"""The kernels compiled for an H100 or H200, which needs no GPU: what they take of one."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from coat_deploy.network.fused import fuse
from coat_deploy.network.variants import VARIANTS, Variant

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from coat_deploy.network.fused import launches  # noqa: E402

SHARED_BYTES = 227 << 10
SPILLED_BYTES = {"attend_kernel": 64}
"""Of 128 tokens in 16 bits; of 64 tokens none are, and an H200 takes 1.17 times as long for 152
channels in fp16."""
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PUBLISHED = [variant for variant in VARIANTS.values() if variant.published]
WINDOWS = [3, 3, 5, 5, 5, 7, 7, 7]


@dataclass(frozen=True)
class Compiled:
    name: str
    shared_bytes: int
    registers: int
    spilled_bytes: int
    assembly: str


def compile_for_sm90(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """Compile as a launch would, from the types of what it is given."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") & constants.keys()}
    types = dict.fromkeys(constants, "constexpr")
    aligned = {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            types[name] = f"*{TYPES[value.dtype]}"
        elif value == 1:
            types[name], constants[name] = "constexpr", 1
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.fixture(scope="module")
def described() -> dict[str, Compiled]:
    """What is known of binaries, by their hash: blocks of several variants have them in common."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def compiler(
    tmp_path: Path, described: dict[str, Compiled]
) -> tuple[Callable[[Any], Any], list[Compiled]]:
    """Return a wrapper of kernels whose launches compile, and what they compiled."""
    done: list[Compiled] = []

    class Launcher:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(0 < side < (1 << 16) for side in grid[1:])
            return self.launch

        def launch(self, *arguments: Any, **constants: Any) -> None:
            binary = compile_for_sm90(self.kernel, arguments, constants)
            if binary.hash not in described:
                described[binary.hash] = describe(self.kernel.__name__, binary, tmp_path)
            done.append(described[binary.hash])

    return Launcher, done


def describe(name: str, binary: Any, folder: Path) -> Compiled:
    (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [os.fspath(reader), "-res-usage", os.fspath(folder / "kernel.cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told)
    assert used is not None, told
    registers, stack, local = map(int, used.groups())
    return Compiled(name, binary.metadata.shared, registers, stack + local, binary.asm["ptx"])


def launch_block(variant: Variant, scale: int, dtype: torch.dtype, wrap: Any) -> None:
    """Launch what a block of a scale needs for 256 images of the published size."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    channels = variant.channels[scale - 1]
    side = variant.input_size // variant.patch_size // 2 ** (scale - 1)
    tokens, size = 1 + side**2, (side, side)
    taps, bias = empty(49, channels, dtype=torch.float32), empty(channels, dtype=torch.float32)
    launches.conv_attention(empty(256, tokens, 3 * channels), taps, bias, 8, WINDOWS, size, wrap)
    x = empty(256, tokens, channels)
    launches.encode_position(x, taps[:9], bias, size, wrap)
    launches.layer_norm(x, empty(channels), empty(channels), 1e-6, wrap)
    if channels in fuse.FFN_CHANNELS:
        hidden = variant.ffn_ratios[scale - 1] * channels
        vector = empty(channels)
        weights = (empty(hidden, channels), empty(hidden), empty(channels, hidden), vector)
        launches.feed_forward(x, vector, vector, *weights, 1e-6, wrap)


def check(done: list[Compiled]) -> None:
    assert len(done) in (5, 6)
    for kernel in done:
        assert kernel.shared_bytes <= SHARED_BYTES, kernel.name
        assert kernel.spilled_bytes <= SPILLED_BYTES.get(kernel.name, 0), kernel.name
        assert kernel.registers <= 255, kernel.name
        assert "ld.global.v4" in kernel.assembly or "cp.async" in kernel.assembly, kernel.name
    multiply = [kernel.name for kernel in done if "wgmma" in kernel.assembly]
    assert multiply == ["context_kernel", "attend_kernel", "feed_forward_kernel"][: len(done) - 3]


def test_a_block_compiles_within_the_registers_of_sm90(compiler) -> None:
    launch_block(VARIANTS["coat_lite_mini"], 1, torch.float16, compiler[0])
    check(compiler[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", PUBLISHED, ids=lambda variant: variant.name)
def test_every_block_compiles_within_the_registers_of_sm90(compiler, variant, scale, dtype) -> None:
    launch_block(variant, scale, dtype, compiler[0])
    check(compiler[1])


def test_one_image_is_shared_by_many_programs() -> None:
    assert launches.split_tokens(256, 3137) == (5, 640)
    assert launches.split_tokens(1, 3137) == (16, 256)
    assert launches.split_tokens(8, 50) == (1, 64)
    for programs in (1, 7, 8, 256, 4096):
        for tokens in (2, 50, 129, 785, 3137, 9217):
            splits, chunk = launches.split_tokens(programs, tokens)
            assert splits * chunk >= tokens and chunk % launches.BLOCK == 0


def test_kernels_are_captured_for_any_number_of_images() -> None:
    """What compilers take: three kernels, whose chunks follow from a batch that is not known."""

    def attend(qkv: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        size = (28, 28)
        return launches.conv_attention(qkv, taps, bias, 8, WINDOWS, size, torch.library.wrap_triton)

    inputs = (torch.randn(6, 785, 3 * 64), torch.randn(49, 64), torch.randn(64))
    graph = make_fx(attend, tracing_mode="symbolic")(*inputs)
    kernels = [node for node in graph.graph.nodes if "triton_kernel" in str(node.target)]
    grids = [node.kwargs["grid"][0] for node in kernels]
    assert [grid[0] for grid in grids] == [1, 4, 1]
    assert not any(isinstance(side, int) for grid in grids[:2] for side in grid[1:])
    guards = [str(guard.expr) for guard in graph.shape_env.guards]
    # Min is the number of chunks, which is 1 for many images: no graph may rule that out.
    assert not [g for g in guards if g.startswith(("Eq(Min", "Ne(Min")) and g.endswith(", 1)")]
