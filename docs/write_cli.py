"""Write docs/cli.md from the command line's own --help, so that it cannot rot."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cli.md"
COMMANDS = (
    (), ("train",), ("study",), ("export",), ("validate",), ("evaluate",), ("bench",),
    ("predict",), ("serve",), ("selftest",), ("triton",), ("kserve",), ("models",),
    ("models", "list"), ("models", "show"), ("doctor",), ("gpu-report",),
)  # fmt: skip


def help_text(command: tuple[str, ...]) -> str:
    """Return what `coat-deploy COMMAND --help` prints in 100 columns, without colours."""
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    environment.pop("FORCE_COLOR", None)
    done = subprocess.run(
        [sys.executable, "-c", "from coat_deploy.cli.app import main; main()", *command, "--help"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def page() -> str:
    """Return the whole page."""
    parts = ["# Commands\n\nWritten by `make docs` from `--help`.\n"]
    for command in COMMANDS:
        title = " ".join(("coat-deploy", *command))
        parts.append(f"## {title}\n\n```\n{help_text(command)}\n```\n".replace(" -c [", " ["))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
