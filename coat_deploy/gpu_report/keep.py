"""Make a report and keep it: what every door to it does."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from coat_deploy.errors import RepositoryError, UsageError
from coat_deploy.gpu_report.options import ReportOptions
from coat_deploy.gpu_report.render import to_markdown, to_record
from coat_deploy.gpu_report.report import Progress, Report, report
from coat_deploy.measure.latency import append_records


@dataclass(frozen=True)
class Keep:
    """Where to keep a report, and the command line that made it."""

    command: str
    record: Path | None = None
    markdown: Path | None = None


def make_report(options: ReportOptions, keep: Keep, progress: Progress | None = None) -> Report:
    """Return a report, kept where asked.

    Raises: UsageError before anything is measured where it could not be kept; as `report`.
    """
    for path in filter(None, (keep.record, keep.markdown)):
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise UsageError(f"{path}: not a file in a folder that exists. Make the folder first.")
    found = report(options, progress)
    if keep.record:
        now = datetime.datetime.now(datetime.UTC)
        append_records(keep.record, [to_record(found, keep.command, now)])
    if keep.markdown:
        try:
            keep.markdown.write_text(to_markdown(found), encoding="utf-8")
        except OSError as error:
            raise RepositoryError(
                f"{keep.markdown}: cannot be written ({error.strerror})."
            ) from error
    return found
