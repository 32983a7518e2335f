import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from coat_deploy import diagnosis
from coat_deploy.cli import console
from coat_deploy.cli.doctor import doctor
from coat_deploy.diagnosis import Diagnosis, Finding, TargetState
from coat_deploy.machine import Machine

app = typer.Typer()
app.command()(console.guarded(doctor))

MACHINE = Machine("A processor", 1, 1, None, (), None, "Linux", "3.11", {})
OK = Finding("ok", "python", "3.11.7")
NOTE = Finding("note", "target eager", "not installed", 'pip install "coat-deploy[torch]"')
PROBLEM = Finding("problem", "clash", "two of them", "pip uninstall --yes a b")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """The findings that the command will be told."""
    findings: list[Finding] = []
    state = TargetState("eager", False, False, error=NOTE.what, command=NOTE.command)
    monkeypatch.setattr(
        diagnosis, "diagnose", lambda: Diagnosis(tuple(findings), MACHINE, (state,))
    )
    return findings


def test_notes_leave_the_status_at_0(found: list[Finding]) -> None:
    found += [OK, NOTE]
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    assert "No problems." in result.stdout


def test_a_problem_makes_the_status_1(found: list[Finding]) -> None:
    found += [OK, NOTE, PROBLEM]
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "No problems." not in result.stdout


def test_commands_that_mend_are_printed_whole_on_lines_of_their_own(found: list[Finding]) -> None:
    found += [OK, NOTE, PROBLEM]
    lines = [line.strip() for line in CliRunner().invoke(app, []).stdout.splitlines()]
    assert NOTE.command in lines
    assert PROBLEM.command in lines


def test_a_command_that_mends_several_is_printed_once(found: list[Finding]) -> None:
    found += [NOTE, replace(NOTE, subject="extra torch")]
    text = CliRunner().invoke(app, []).stdout
    assert NOTE.command is not None and text.count(NOTE.command) == 1
    assert "target eager, extra torch" in text


def test_what_must_be_mended_stands_apart_from_what_may_be(found: list[Finding]) -> None:
    found += [NOTE, PROBLEM]
    _, must, may = re.split("To mend:|If wanted:", CliRunner().invoke(app, []).stdout)
    assert (PROBLEM.subject in must, NOTE.subject in may) == (True, True)


def test_nothing_to_mend_leaves_that_part_out(found: list[Finding]) -> None:
    found.append(OK)
    assert "To mend" not in CliRunner().invoke(app, []).stdout


def test_json_is_one_object_with_the_same_status(found: list[Finding]) -> None:
    found += [OK, PROBLEM]
    result = CliRunner().invoke(app, ["--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert set(document) == {"findings", "machine", "targets"}
    assert document["findings"][1] == {
        "level": "problem",
        "subject": "clash",
        "what": "two of them",
        "command": "pip uninstall --yes a b",
    }
    assert document["targets"]["eager"]["usable"] is False


def test_the_command_is_described_without_heavy_imports() -> None:
    script = (
        "import sys, coat_deploy.cli.doctor, coat_deploy.cli.models;"
        "print({'numpy', 'torch', 'onnx', 'coat_deploy.runner'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "set()", done.stderr
