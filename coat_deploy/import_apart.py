"""Import modules in another process, to see whether they can be imported at all."""

import signal
import subprocess
import sys
from collections.abc import Sequence

IMPORT_TIMEOUT_S = 120.0
"""How long a runtime's import may take: PyTorch from a cold network disk needs most of it."""

LONGEST_REASON = 300
"""Characters of another package's error message that are told."""

# One line a module, as far as it gets; a leftover folder of a half removed package imports as an
# empty module, but has no version.
_PROBE = """import importlib, sys
for name in sys.argv[1:]:
    print("imported", name, importlib.import_module(name).__version__, flush=True)
"""


def import_apart(
    modules: Sequence[str], timeout_s: float = IMPORT_TIMEOUT_S
) -> tuple[dict[str, str], str | None]:
    """Import `modules` in turn in another process; return versions, and the error that ended it."""
    # -P: a file torch.py in the working folder is not the package.
    command = [sys.executable, "-P", "-c", _PROBE, *modules]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        return _imported(error.stdout or b""), f"not done after {timeout_s:g} s"
    except OSError as error:
        return {}, f"{sys.executable} cannot be started ({error.strerror})"
    versions = _imported(done.stdout)
    if done.returncode == 0:
        return versions, None
    if done.returncode < 0:
        return versions, f"the process was ended by: {signal.strsignal(-done.returncode)}"
    lines = done.stderr.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
    return versions, last[:LONGEST_REASON]


def _imported(printed: bytes) -> dict[str, str]:
    lines = [line.split(" ", 2) for line in printed.decode(errors="replace").splitlines()]
    return {words[1]: words[2] for words in lines if words[0] == "imported" and len(words) == 3}
