#!/bin/sh
# Make a virtual environment with NVIDIA's tritonserver and what its models need, for
# tests/triton/test_server.py: about 0.5 GB. The server of this wheel knows only the Python
# backend, which is loaded by the system's python3.11 with NumPy below 2.
set -eu
place=${1:-.venv-triton}
/usr/bin/python3.11 -m venv "$place"
"$place/bin/python" -m pip install --quiet --disable-pip-version-check \
    "nvidia-pytriton==0.7.0" "numpy==1.26.4" "onnxruntime==1.32.0" "pillow==13.0.0"
echo "$place: has $("$place"/bin/python -c 'import pytriton, pathlib
print(pathlib.Path(pytriton.__file__).parent / "tritonserver/bin/tritonserver")')"
