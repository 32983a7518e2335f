"""The flavours of TensorRT: libraries that share most of their names.

TensorRT 10 and 11 are one module, `tensorrt`; TensorRT for RTX is `tensorrt_rtx`. Only names that
all of them have are used outside this file, but where a flavour says that it has more.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flavour:
    """One of the libraries.

    `title`: as NVIDIA calls it. `module` to import. `extra`: ours that installs it.
    `ahead_of_time`: it builds for GPUs that are not at hand, without one.
    """

    target: str
    title: str
    module: str
    extra: str
    ahead_of_time: bool

    def missing(self) -> str | None:
        """Return the command that installs what is lacking, or None."""
        found = all(map(importlib.util.find_spec, (self.module, "cuda")))
        return None if found else f'pip install "coat-deploy[{self.extra}]"'

    def version(self) -> str:
        """Return the library's version."""
        return str(self.load().__version__)

    def load(self) -> Any:
        """Import the library."""
        return importlib.import_module(self.module)


TENSORRT = Flavour("tensorrt", "TensorRT", "tensorrt", "tensorrt", ahead_of_time=False)
TENSORRT_RTX = Flavour(
    "tensorrt-rtx", "TensorRT for RTX", "tensorrt_rtx", "tensorrt-rtx", ahead_of_time=True
)


class Messages:
    """What a library says while it works, from INFO on; `errors` apart."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []

    def logger(self, trt: Any) -> Any:
        """Return an object that the library logs to."""
        messages, names = self, _severities(trt)

        class Listener(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                name = names.get(int(severity), "VERBOSE")
                if name == "VERBOSE":
                    return
                messages.lines.append(f"{name}: {message}")
                _log.debug("%s: %s", name, message)
                if name in ("ERROR", "INTERNAL_ERROR"):
                    messages.errors.append(message)

        return Listener()

    def first_error(self) -> str:
        """Return, in one line, the first error since this was last asked."""
        text = self.errors[0] if self.errors else "it does not say why"
        self.errors.clear()
        return " ".join(text.split())

    def text(self) -> str:
        """Return all of it, a line a message."""
        return "".join(f"{line}\n" for line in self.lines)


def _severities(trt: Any) -> dict[int, str]:
    severity = trt.ILogger.Severity
    return {
        int(severity.INTERNAL_ERROR): "INTERNAL_ERROR",
        int(severity.ERROR): "ERROR",
        int(severity.WARNING): "WARNING",
        int(severity.INFO): "INFO",
    }
