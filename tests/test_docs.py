"""Pages that would rot: the commands in the README, and docs/cli.md."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer

from coat_deploy.cli.app import app

ROOT = Path(__file__).resolve().parents[1]


def console_lines(page: str) -> list[str]:
    """The `$ coat-deploy ...` lines of a page's console blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return re.findall(r"^\$ (coat-deploy [^#\n]*)", "\n".join(blocks), re.MULTILINE)


def inline_commands(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [" ".join(c.split()) for c in re.findall(r"`(coat-deploy [a-z][^`]*)`", text)]


PAGES = sorted(
    page
    for folder in (".", "docs", "docs/decisions", "models")
    for page in ROOT.glob(f"{folder}/*.md")
)
COMMANDS = [
    *console_lines("README.md"),
    *console_lines("docs/serving.md"),
    *console_lines("docs/elsewhere.md"),
    *console_lines("docs/labelling.md"),
    *inline_commands("README.md"),
    *inline_commands("models/README.md"),
]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_in_a_page_is_one_the_program_takes(line):
    name, *arguments = shlex.split(line.partition(" | ")[0])[1:]
    group = typer.main.get_command(app)
    command = group.commands[name]
    command.make_context(name, arguments)  # parses, and raises for what does not exist


def test_readme_shows_commands():
    assert len(COMMANDS) > 8


def script(name: str) -> ModuleType:
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_page_is_what_help_prints():
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == script("write_cli").page(), "run `make docs`"


def test_figures_of_the_readme_are_those_of_the_records():
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written == script("write_figures").page(), "run `make docs`"


def record(name: str, p50_ms: float, date: str = "2026-01-01", **more: object) -> dict[str, object]:
    return {"model": "toy", "batch": 1, "name": name, "p50_ms": p50_ms, "date": date, **more}


def figures_table(*records: dict[str, object]) -> list[str]:
    figures = script("write_figures")
    return figures.table(figures.newest_runs(list(records))).splitlines()


def test_ratios_of_the_readme_are_over_the_traced_graph_whatever_the_baseline_was():
    traced = record("onnxruntime:traced", 30.0, ratio=2.0, baseline="eager")
    ours = record("onnxruntime", 20.0, ratio=3.0, baseline="eager")
    head, _, row = figures_table(ours, traced)
    assert head == "| model | batch | onnxruntime, traced | onnxruntime, ours |"
    assert row == "| toy | 1 | 30.0 ms (1.00x) | 20.0 ms (1.50x) |"


def test_a_newer_run_without_the_traced_graph_does_not_replace_one_with_it():
    older = [record("onnxruntime:traced", 30.0), record("onnxruntime", 20.0)]
    newer = [record("onnxruntime", 10.0, "2026-01-02")]
    assert figures_table(*older, *newer)[2] == "| toy | 1 | 30.0 ms (1.00x) | 20.0 ms (1.50x) |"


def test_the_newest_of_like_runs_is_shown():
    days = ("2026-01-01", "2026-01-02")
    runs = [record("onnxruntime:traced", 30.0 + i, day) for i, day in enumerate(days)]
    assert figures_table(*runs)[2] == "| toy | 1 | 31.0 ms (1.00x) |"


def test_machines_are_not_mixed():
    def on(cpu: str, *features: str) -> dict[str, object]:
        return {"machine": {"cpu": cpu, "cpu_features": list(features)}}

    kinds = (on("one", "avx2"), *[on("other", "avx2")] * 3, *[on("other", "avx2", "avx512f")] * 2)
    records = [record("eager", float(ms)) | kind for ms, kind in enumerate(kinds)]
    groups = script("write_figures").machines(records)
    assert [[r["p50_ms"] for r in group] for group in groups] == [[1, 2, 3], [4, 5], [0]]


def test_what_a_run_lacks_is_a_dash():
    rows = figures_table(record("eager", 40.0), record("onnxruntime:traced", 30.0, model="other"))
    assert rows[2:] == ["| toy | 1 | 40.0 ms | - |", "| other | 1 | - | 30.0 ms (1.00x) |"]


def test_tables_of_the_study_are_those_of_its_record():
    written = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert written == script("write_study").page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
