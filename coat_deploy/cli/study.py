"""`coat-deploy study`: the paper's tables, on your images and this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.cli.tables import render_table
from coat_deploy.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coat_deploy.measure.bench import BenchOptions
    from coat_deploy.study.cost import Cost
    from coat_deploy.study.tables import Row

TABLES = ("positions", "co-scale", "cost")


def study(
    data: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="Labelled images, as in `train`; photographs, best."),
    ] = "",
    tables: Annotated[
        str, typer.Option(metavar="NAME,NAME", help=f"Of {', '.join(TABLES)}.")
    ] = ",".join(TABLES),
    seeds: Annotated[
        int, typer.Option(min=1, max=100, metavar="N", help="Trainings of each cell.")
    ] = 3,
    epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Epochs of each training.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fields of the trainings' recipe to set, as TOML."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Trainings at a time, a thread each. Default: one a core."
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Append every result as a line of JSON, at once; trainings that are in it "
            "already are not repeated.",
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(min=0, metavar="S", help="Seconds to measure latency, for each table."),
    ] = 60.0,
    threads: console.ThreadsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Measure what the parts of CoaT are worth and what each variant costs.

    Trains small variants with and without the position encodings (CPE, CRPE) and with each way of
    co-scale, several seeds each, and prints top-1 with its deviation beside parameters, MACs and
    latency; then the cost of every published variant.
    """
    from coat_deploy.study.cells import variant_cells

    names = console.comma_separated(tables, "tables")
    for name in names:
        if name not in TABLES:
            raise UsageError(unknown_name("table", name, TABLES))
    wanted = [name for name in names if name != "cost"]
    if wanted and not data:
        raise UsageError("--data: missing. Name labelled images, or take --tables cost.")
    document: dict[str, Any] = {}
    options = bench_options(budget)
    if wanted:
        rows, machine = ablate(wanted, data, seeds, epochs, recipe, jobs, record, threads, options)
        document |= {"ablation": [row.to_json() for row in rows], "machine": machine}
        if not as_json:
            console.emit(render_ablation(rows))
    if "cost" in names:
        costs, machine = cost_table(variant_cells(), threads, options)
        document |= {"cost": [cost.to_json() for cost in costs], "machine": machine}
        if not as_json:
            console.emit(render_costs(costs))
    if record:
        keep(record, document)
    if as_json:
        console.print_json(document)


def bench_options(budget: float) -> "BenchOptions":
    """Return how latency is measured. Raises UsageError."""
    from coat_deploy.measure.bench import BenchOptions

    return BenchOptions(budget_s=budget)


def ablate(
    tables: "Sequence[str]",
    data: str,
    seeds: int,
    epochs: int | None,
    file: Path | None,
    jobs: int | None,
    record: Path | None,
    threads: int | None,
    options: "BenchOptions",
) -> "tuple[list[Row], dict[str, Any]]":
    """Return the rows of the ablation tables, trained and measured, and the machine."""
    from coat_deploy.data.options import DataOptions
    from coat_deploy.data.sources import open_splits
    from coat_deploy.machine import describe
    from coat_deploy.study.cells import CO_SCALE, POSITIONS, all_cells
    from coat_deploy.study.cost import measure_costs
    from coat_deploy.study.tables import ablation_rows
    from coat_deploy.study.trial import STUDY_FIELDS
    from coat_deploy.study.trials import plan_trials, run_trials
    from coat_deploy.train.recipe import read_recipe, resolve_recipe

    given = {"epochs": epochs} if epochs else {}
    fields = {**STUDY_FIELDS, **(read_recipe(file) if file else {}), **given}
    resolved = resolve_recipe("small", data, fields)
    data_options = DataOptions()
    classes = len(open_splits(data, data_options).train.label_names)  # and fail early
    cells = all_cells([{"positions": POSITIONS, "co-scale": CO_SCALE}[name] for name in tables])
    trials = plan_trials(cells, resolved, seeds, data, data_options)
    with console.progress_bar("training", len(trials)) as advance:

        def tell(result: dict[str, Any]) -> None:
            advance(1)
            console.note(
                f"{result['group']}, {result['cell']}, seed {result['seed']}: top-1 "
                f"{result['top1']:.1%} in {result['seconds'] / 60:.1f} min"
            )

        results = run_trials(trials, jobs or describe().threads, record, tell)
    side = resolved.size or cells[0].variant.input_size
    costs = []
    machine: dict[str, Any] = {}
    for group in dict.fromkeys(cell.group for cell in cells):
        members = [cell for cell in cells if cell.group == group]
        measured, found = measure_costs(members, classes, (side, side), threads, options)
        costs += measured
        machine = dict(found)
    return ablation_rows(cells, results, costs), machine


def cost_table(
    cells: "Sequence[Any]", threads: int | None, options: "BenchOptions"
) -> "tuple[list[Cost], dict[str, Any]]":
    """Return the costs of the published variants, at ImageNet's classes, and the machine."""
    from coat_deploy.study.cost import measure_costs

    with console.steps("measuring the variants") as tell:
        costs, machine = measure_costs(
            cells, 1000, None, threads, options, lambda what, done: tell(f"{what} {done:.0%}")
        )
    return costs, dict(machine)


def keep(record: Path, document: dict[str, Any]) -> None:
    """Append the tables, and when they were made, to the record."""
    from datetime import UTC, datetime

    from coat_deploy.measure.latency import append_records

    line = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **document}
    append_records(record, [json.dumps(line, allow_nan=False)])


def render_ablation(rows: "Sequence[Row]") -> str:
    """Return a table for each group of cells."""
    parts = []
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        table = [
            (
                row.name,
                f"{row.mean:.1%}",
                "-" if row.deviation is None else f"{100 * row.deviation:.1f}",
                f"{100 * row.difference:+.1f}{_error(row)}",
                f"{row.cost.parameters / 1e6:.2f}",
                f"{row.cost.macs / 1e6:.1f}",
                f"{row.cost.latency_ms:.2f}",
            )
            for row in members
        ]
        columns = ("", "top-1", "+- (seeds)", "against the first", "params M", "MMACs", "ms")
        seeds, images = len(members[0].top1), members[0].images
        title = f"{group}: {seeds} seed{'s'[: seeds != 1]}, {images} images"
        parts.append(render_table(columns, table, title))
    return "\n".join(parts)


def _error(row: "Row") -> str:
    return "" if row.difference_error is None else f" +- {100 * row.difference_error:.1f}"


def render_costs(costs: "Sequence[Cost]") -> str:
    """Return the table of the variants' costs."""
    rows = [
        (
            cost.name,
            f"{cost.size[0]}",
            f"{cost.parameters / 1e6:.2f}",
            f"{cost.macs / 1e9:.2f}",
            f"{cost.latency_ms:.1f}",
            "-" if cost.memory_mib is None else f"{cost.memory_mib:.0f}",
        )
        for cost in costs
    ]
    columns = ("", "size", "params M", "GMACs", "ms an image", "peak MiB")
    return render_table(columns, rows, "cost in PyTorch, one image at a time")
