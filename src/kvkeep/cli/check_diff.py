"""``kvkeep check diff``: what changed from one report to another."""

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvkeep.model.errors import InputError
from kvkeep.validate.report.diff import ReportDiff, compare_reports
from kvkeep.validate.report.form import read_report
from kvkeep.validate.report.json_file import write_json

EXIT_WORSE = 1
EXIT_INPUT = 2
CHANGES_SHOWN_MAX = 20


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File to write it to.")
@click.option(
    "--slower-max",
    type=click.FloatRange(min=1.0),
    help="Fail where the first token surely comes later by more than this ratio, such as 1.1.",
)
@click.option("--quiet", is_flag=True, help="Show no tables.")
def diff(
    before: Path, after: Path, json_path: Path | None, slower_max: float | None, quiet: bool
) -> None:
    """Compare two JSON reports, each request with itself.

    Exit code 0 if whatever held in BEFORE holds in AFTER, 1 if something does not, 2 for bad input.
    """
    try:
        found = compare_reports(read_report(before), read_report(after))
        if json_path is not None:
            write_json(found.to_dict(), json_path)
    except InputError as error:
        click.echo(f"kvkeep check diff: {error}", err=True)
        sys.exit(EXIT_INPUT)
    slower = found.slower_than(slower_max) if slower_max is not None else []
    console = Console(quiet=quiet)
    _show(found, console)
    for latency in slower:
        console.print(
            f"[red]slower[/] {escape(latency.run)}, {escape(latency.phase)}: "
            f"{latency.median_ratio:.2f} times"
        )
    is_worse = found.is_worse or bool(slower)
    console.print("[bold red]worse[/]" if is_worse else "[bold green]nothing is worse[/]")
    sys.exit(EXIT_WORSE if is_worse else 0)


def _show(found: ReportDiff, console: Console) -> None:
    console.print(_runs(found))
    for name, titles in (("missing", found.missing), ("new", found.added)):
        for title in titles:
            console.print(f"{name} run: {escape(title)}")
    for moved in found.moved:
        color = "red" if moved.is_worse else "green"
        told = f"{moved.run}, {moved.what}: {moved.before} -> {moved.after}"
        console.print(f"[{color}]{escape(told)}[/]")
    worst = sorted(found.changes, key=lambda change: not change.is_worse)
    for change in worst[:CHANGES_SHOWN_MAX]:
        color = "red" if change.is_worse else "green"
        told = f"{change.run}, {change.phase}, request {change.index + 1} ({change.prompt_id})"
        console.print(f"[{color}]{escape(told)}: {change.before} -> {change.after}[/]")
    if len(worst) > CHANGES_SHOWN_MAX:
        console.print(f"... and {len(worst) - CHANGES_SHOWN_MAX} more (--json has all).")
    if found.shares:
        console.print(_shares(found))
    if found.latencies:
        console.print(_latencies(found))


def _runs(found: ReportDiff) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in ("run", "requests in both", "only before", "only after", "broken", "mended", "p"):
        table.add_column(head)
    for run in found.runs:
        counts = (run.pairs, run.only_before, run.only_after, run.broken, run.mended)
        table.add_row(escape(run.run), *map(str, counts), f"{run.p:.3g}")
    return table


def _shares(found: ReportDiff) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in ("served share", "before", "after"):
        table.add_column(head)
    for share in found.shares:
        name = " · ".join(part for part in (share.run, share.arm) if part)
        values = ("-" if value is None else f"{value:.1%}" for value in (share.before, share.after))
        table.add_row(escape(name), *values)
    return table


def _latencies(found: ReportDiff) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in ("first token", "phase", "requests", "after / before", "faster", "slower", "p"):
        table.add_column(head)
    for each in found.latencies:
        numbers = (str(each.pairs), f"{each.median_ratio:.3f}", str(each.faster), str(each.slower))
        table.add_row(escape(each.run), escape(each.phase), *numbers, f"{each.p:.3g}")
    return table
