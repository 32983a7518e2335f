"""`coat-deploy doctor`."""

import typer

from coat_deploy.cli import console


def doctor(as_json: console.JsonOption = False) -> None:
    """Examine this installation and say what mends it.

    Tells versions, what the processor's features give, the GPU, packages that clash, whether each
    target really imports, and where models are read from and written to. Changes nothing.
    `note` is worth knowing, `problem` wants mending: exit status 0 without problems, 1 with one.
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
        # Below the table and plain, so that a command can be copied whole.
        commands = [finding for finding in findings if finding.command]
        if commands:
            print("\nTo mend:")
        for finding in commands:
            print(f"  {finding.subject}\n    {finding.command}")
        if diagnosis.healthy:
            print("\nNo problems.")
    if not diagnosis.healthy:
        raise typer.Exit(1)
