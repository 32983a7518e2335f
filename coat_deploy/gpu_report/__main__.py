"""`python -m coat_deploy.gpu_report`: the command where typer and rich are not installed."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from coat_deploy.errors import CoatDeployError, UsageError
from coat_deploy.gpu_report.keep import Keep, make_report
from coat_deploy.gpu_report.options import HELP, ReportOptions, parse_variants
from coat_deploy.gpu_report.render import to_markdown

PROGRAM = "python -m coat_deploy.gpu_report"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parsed = _parser().parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = ReportOptions(
            budget_s=parsed.budget,
            variants=parse_variants(_parts(parsed.variants)),
            ways=_parts(parsed.ways),
            bench=_parts(parsed.bench),
            batches=tuple(map(_number, _parts(parsed.batch))),
            device=parsed.device,
        )
        keep = Keep(f"{PROGRAM} {shlex.join(words)}".strip(), parsed.record, parsed.markdown)
        found = make_report(options, keep, _tell)
    except CoatDeployError as error:
        _tell(str(error))
        return error.exit_status
    text = json.dumps(found.to_json(), indent=2) + "\n" if parsed.json else to_markdown(found)
    sys.stdout.write(text)
    return 0 if found.sound else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    defaults = ReportOptions()
    parser.add_argument("--budget", type=float, default=defaults.budget_s, help=HELP["budget"])
    parser.add_argument("--variants", default="", help=HELP["variants"])
    parser.add_argument("--ways", default="", help=HELP["ways"])
    parser.add_argument("--bench", default=",".join(defaults.bench), help=HELP["bench"])
    batches = ",".join(map(str, defaults.batches))
    parser.add_argument("--batch", default=batches, help=HELP["batch"])
    parser.add_argument("--device", default=defaults.device, help=HELP["device"])
    parser.add_argument("--record", type=Path, help=HELP["record"])
    parser.add_argument("--markdown", type=Path, help=HELP["markdown"])
    parser.add_argument("--json", action="store_true", help=HELP["json"])
    return parser


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise UsageError(f"--batch: must be whole numbers (got {text!r}).")
    return int(text)


def _tell(message: str) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    sys.exit(main())
