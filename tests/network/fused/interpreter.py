"""Launches kernels in Triton's interpreter: a process of its own, since it is chosen at import.

Reads pickled (launch, arguments, constants of `launches` that are other) from stdin; writes
pickled tensors, or the error, to stdout.
"""

import os
import pickle
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from coat_deploy.network.fused import launches


def compute_bfloat16_as_a_gpu_does() -> None:
    """Mend the interpreter: it cuts bfloat16 off where a GPU rounds, and multiplies its bits."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounded(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, source, kind)

    def widened(x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            exact = (x.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(exact, tl.float32)
        return x

    def multiplied(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    builder.cast_impl, builder.create_dot = rounded, multiplied


def as_it_is(kernel: Any) -> Any:
    return kernel


def main() -> None:
    compute_bfloat16_as_a_gpu_does()
    torch.set_num_threads(1)
    known = {name: getattr(launches, name) for name in dir(launches) if name.isupper()}
    while True:
        try:
            name, arguments, changed = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        vars(launches).update(known | changed)
        try:
            answer = getattr(launches, name)(*arguments, as_it_is)
        except Exception as error:
            answer = RuntimeError(repr(error))
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
