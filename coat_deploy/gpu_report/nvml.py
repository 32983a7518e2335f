"""Power, memory and clocks of the GPU, from the driver's own library; None where it tells none."""

import contextlib
import ctypes
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_SM_CLOCK = 1


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class Nvml:
    """The GPU of a UUID ("GPU-..."), or the first."""

    def __init__(self, uuid: str | None = None) -> None:
        self._library: Any = None
        self._handle = ctypes.c_void_p()
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(_LIBRARY)
            if library.nvmlInit_v2() == 0 and self._find(library, uuid):
                self._library = library

    def _find(self, library: Any, uuid: str | None) -> bool:
        handle = ctypes.byref(self._handle)
        if uuid and library.nvmlDeviceGetHandleByUUID(uuid.encode(), handle) == 0:
            return True
        return bool(library.nvmlDeviceGetHandleByIndex_v2(0, handle) == 0)

    def millijoules(self) -> int | None:
        """Return the energy used since the driver was loaded."""
        return self._number("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())

    def used_mib(self) -> int | None:
        """Return the device memory in use, by whomever."""
        memory = _Memory()
        if not self._call("nvmlDeviceGetMemoryInfo", ctypes.byref(memory)):
            return None
        return int(memory.used) >> 20

    def clock_mhz(self) -> int | None:
        """Return the clock of the multiprocessors."""
        value = ctypes.c_uint()
        found = self._call("nvmlDeviceGetClockInfo", _SM_CLOCK, ctypes.byref(value))
        return int(value.value) if found else None

    def _number(self, name: str, value: Any) -> int | None:
        return int(value.value) if self._call(name, ctypes.byref(value)) else None

    def _call(self, name: str, *arguments: Any) -> bool:
        if self._library is None:
            return False
        return bool(getattr(self._library, name)(self._handle, *arguments) == 0)
