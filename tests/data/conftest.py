"""Tiny images, made where they are needed."""

import io
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


def encoded(
    colour: tuple[int, int, int] = (200, 30, 30),
    size: tuple[int, int] = (8, 6),
    form: str = "PNG",
    orientation: int | None = None,
) -> bytes:
    """A file of one colour with a white dot at the upper left, of 8x6 pixels unless told."""
    image = Image.new("RGB", size, colour)
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    file = io.BytesIO()
    image.save(file, form, exif=exif)
    return file.getvalue()


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write images at `names` below a folder, each in a colour of its own."""

    def write(*names: str, below: str = "data") -> Path:
        for i, name in enumerate(names):
            path = tmp_path / below / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded((i % 256, 30, 30)))
        return tmp_path / below

    return write


@pytest.fixture(scope="session")
def library() -> ModuleType:
    """The package datasets; importing it takes a second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("datasets")


@pytest.fixture
def datasets(
    library: ModuleType, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The package datasets with a cache of its own; to ask for the network fails the test."""
    asked: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # It waits for Arrow's threads at the end of each stream, for programs that exit right then.
    monkeypatch.setattr(library.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield library
    assert not asked
