import ctypes
import sys
from pathlib import Path

import pytest

from coat_deploy.shared_library import needed

linux = pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux's")


@linux
def test_the_libraries_that_one_needs_are_told() -> None:
    import _ctypes

    assert "libc.so.6" in needed(Path(_ctypes.__file__))


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 100, b"text"])
def test_a_file_that_is_no_library_needs_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lib.so").write_bytes(content)
    assert needed(tmp_path / "lib.so") == ()


def test_a_file_that_is_not_there_needs_none(tmp_path: Path) -> None:
    assert needed(tmp_path / "lib.so") == ()


@linux
def test_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import _ctypes

    monkeypatch.setattr(ctypes, "CDLL", None)
    assert needed(Path(_ctypes.__file__))
