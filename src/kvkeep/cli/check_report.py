"""``kvkeep check report``: a JSON report as a page or as JUnit's XML; its schema."""

import json
import sys
from pathlib import Path

import click

from kvkeep.model.errors import InputError
from kvkeep.validate.report.form import json_schema, read_report
from kvkeep.validate.report.junit import write_junit
from kvkeep.validate.report.page import write_page

EXIT_INPUT = 2


@click.command()
@click.argument("report_path", metavar="[REPORT]", required=False, type=click.Path(path_type=Path))
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Page to write.")
@click.option("--junit", "junit_path", type=click.Path(path_type=Path), help="XML to write.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of reports instead.")
def report(
    report_path: Path | None, html_path: Path | None, junit_path: Path | None, schema: bool
) -> None:
    """Show a JSON report as one HTML page, or as JUnit's XML.

    Exit code 0 if it was written, whatever it says; 2 for bad input.
    """
    if schema:
        click.echo(json.dumps(json_schema(), indent=1))
        return
    try:
        _write(report_path, html_path, junit_path)
    except InputError as error:
        click.echo(f"kvkeep check report: {error}", err=True)
        sys.exit(EXIT_INPUT)


def _write(report_path: Path | None, html_path: Path | None, junit_path: Path | None) -> None:
    if report_path is None:
        raise InputError("Name a report that kvkeep check wrote with --json.")
    if html_path is None and junit_path is None:
        raise InputError("Say what to write: --html FILE, --junit FILE or both.")
    found = read_report(report_path)
    if html_path is not None:
        write_page(found, html_path)
    if junit_path is not None:
        write_junit(found, junit_path)
