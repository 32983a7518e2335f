"""Write the official names of a TensorRT into `tensorrt_names.json`.

    python tests/backends/write_tensorrt_names.py tensorrt-11 tensorrt_bindings
    python tests/backends/write_tensorrt_names.py tensorrt-rtx tensorrt_rtx

They are read from NVIDIA's own Python bindings (packages tensorrt-cu13-bindings and
tensorrt-rtx-cu13). TensorRT's need its libraries, of which only names are wanted here: where they
are lacking, empty libraries of their names are made with the C compiler and loaded first.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LISTS = Path(__file__).with_name("tensorrt_names.json")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvinfer_vc_plugin", "nvinfer_lean")


def main(library: str, module_name: str) -> None:
    """Write the names of a module's classes, with those of their members."""
    try:
        module = importlib.import_module(module_name)
    except (ImportError, OSError):
        sys.modules.pop(module_name, None)
        _load_empty_libraries(module_name)
        module = importlib.import_module(module_name)
    names = {
        name: sorted(member for member in dir(value) if not member.startswith("_"))
        for name, value in inspect.getmembers(module)
        if inspect.isclass(value) and not name.startswith("_")
    }
    names |= {name: [] for name, value in vars(module).items() if inspect.isroutine(value)}
    lists = json.loads(LISTS.read_text(encoding="utf-8")) if LISTS.exists() else {}
    lists[library] = {"version": module.__version__, "source": module_name, "names": names}
    text = json.dumps(dict(sorted(lists.items())), sort_keys=True, separators=(",", ":"))
    LISTS.write_text(text.replace('],"', '],\n"') + "\n", encoding="utf-8")
    print(f"{library} {module.__version__}: {len(names)} names")


def _load_empty_libraries(module_name: str) -> None:
    """Load libraries of every name that the bindings look for, whose functions do nothing."""
    version = importlib.metadata.version("tensorrt-cu13-bindings").split(".")[0]
    found = importlib.util.find_spec(module_name)
    assert found and found.origin
    (binding,) = Path(found.origin).parent.glob("tensorrt*.so")
    listed = subprocess.run(["nm", "-D", "-u", binding], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    # Those of libc and libstdc++ bear a version, Python's begin with its name.
    lacking = [name for name in symbols if "@" not in name and not name.startswith(("Py", "_Py"))]
    source = "".join(f"void {name}(void) {{}}\n" for name in lacking)
    folder = Path(tempfile.mkdtemp())
    for i, name in enumerate(LIBRARIES):
        file = folder / f"lib{name}.so.{version}"
        command = ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(file)]
        content = "" if i else source
        subprocess.run([*command, f"-Wl,-soname,{file.name}"], input=content, text=True, check=True)
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    main(*sys.argv[1:])
