import importlib
import os
import sys
import time
from pathlib import Path

import pytest

from coat_deploy.gpu_report.apart import run_apart

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups")


@pytest.fixture(scope="module")
def work():
    """Work that processes import by its name."""
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)
    try:
        yield importlib.import_module("fake_work")
    finally:
        sys.path.remove(here)


def test_what_is_told_comes_in_order(work, capfd) -> None:
    told = run_apart(work.tell_two, (3, 4), 60)
    assert (told.findings, told.error) == ([{"n": 3}, {"n": 4}], None)
    assert capfd.readouterr() == ("", "")


def test_an_error_is_one_line_and_what_was_told_before_is_kept(work) -> None:
    told = run_apart(work.fail_later, (), 60)
    assert (told.findings, told.error) == ([{"n": 1}], "ValueError: out of memory")


@posix
def test_a_crash_is_told_with_the_last_that_was_said(work) -> None:
    told = run_apart(work.die, (), 60)
    assert told.findings == [{"n": 1}]
    assert told.error == (
        "its process was killed by SIGSEGV. (CUDA error: an illegal memory access)"
    )


@posix
def test_a_process_that_hangs_is_ended_with_what_it_started(work, tmp_path) -> None:
    file = tmp_path / "pid"
    told = run_apart(work.hang, (file,), 5)
    assert told.findings == [{"n": 1}]
    assert told.error == "not done within 5 s; ended"
    end = time.monotonic() + 10
    while Path(f"/proc/{file.read_text()}").exists() and time.monotonic() < end:
        state = Path(f"/proc/{file.read_text()}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
