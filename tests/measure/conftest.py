"""What the tests of measurements share: runners that are not there, in every process."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def fake() -> Iterator[ModuleType]:
    """The module of fake runners, importable by its name here and so in every worker."""
    sys.path.insert(0, str(HERE))
    try:
        yield importlib.import_module("fake_runner")
    finally:
        sys.path.remove(str(HERE))
