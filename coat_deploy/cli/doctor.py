"""`coat-deploy doctor`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from coat_deploy.cli import console

if TYPE_CHECKING:
    from coat_deploy.finding import Finding


def doctor(as_json: console.JsonOption = False) -> None:
    """Examine this installation and say what mends it.

    Tells versions, what the processor's features give, the GPU, packages that
    clash, whether each target really imports, and where models are read from
    and written to. Changes nothing.

    A note is worth knowing, a problem wants mending: the exit status is 0
    without problems, 1 with one.
    """
    from coat_deploy.diagnosis import diagnose

    with console.steps("examining"):
        diagnosis = diagnose()
    if as_json:
        console.print_json(diagnosis.to_json())
    else:
        findings = diagnosis.findings
        rows = [(finding.level, finding.subject, finding.what) for finding in findings]
        console.print_table(("level", "subject", "found"), rows)
        _print_commands("To mend", [found for found in findings if found.level == "problem"])
        _print_commands("If wanted", [found for found in findings if found.level != "problem"])
        if diagnosis.healthy:
            print("\nNo problems.")
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _print_commands(title: str, findings: "Sequence[Finding]") -> None:
    """Print each command once, below the table and plain, so that it can be copied whole."""
    subjects: dict[str, list[str]] = {}
    for finding in findings:
        if finding.command:
            subjects.setdefault(finding.command, []).append(finding.subject)
    if subjects:
        print(f"\n{title}:")
    for command, named in subjects.items():
        print(f"  {', '.join(named)}\n    {command}")
