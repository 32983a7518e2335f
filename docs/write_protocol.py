"""Write the gRPC protocol's descriptors from its .proto files, for Python to load."""

import base64
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "coat_deploy" / "serve" / "rpc"
FILES = ("inference.proto", "status.proto")
PAGE = FOLDER / "descriptors.py"
HEAD = '''"""Written by `make docs` from {files}: a FileDescriptorSet, in base64."""

DESCRIPTORS = """
{text}
"""
'''


def descriptors() -> bytes:
    """Return the compiled files and those they import."""
    import grpc_tools
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from grpc_tools import protoc

    known = Path(grpc_tools.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "descriptors"
        status = protoc.main(
            ["protoc", f"-I{FOLDER}", f"-I{known}", f"--descriptor_set_out={target}",
             "--include_imports", *FILES]
        )  # fmt: skip
        assert status == 0, "protoc failed"
        found = FileDescriptorSet.FromString(target.read_bytes())
    return bytes(found.SerializeToString(deterministic=True))


def page() -> str:
    """Return the whole module."""
    text = "\n".join(textwrap.wrap(base64.b64encode(descriptors()).decode(), 100))
    return HEAD.format(files=" and ".join(FILES), text=text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
