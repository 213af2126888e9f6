"""Writes a run in every form that was asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvkeep.validate.report.form import convert_report
from kvkeep.validate.report.json_file import write_json
from kvkeep.validate.report.junit import write_junit
from kvkeep.validate.report.page import write_page


def write_reports(
    values: Mapping[str, Any],
    *,
    json_path: Path | None = None,
    html_path: Path | None = None,
    junit_path: Path | None = None,
) -> None:
    """Write a report, as `kvkeep.validate.report.form.Report` has it, where a path says so.

    Raises:
        InputError: A place can't be written, or the values are no report.
    """
    if json_path is not None:
        write_json(values, json_path)
    if html_path is None and junit_path is None:
        return
    report = convert_report(dict(values))
    if html_path is not None:
        write_page(report, html_path)
    if junit_path is not None:
        write_junit(report, junit_path)
