"""Shows a run in a terminal: phases, checks, verdicts, and evidence for whatever failed."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvkeep.validate.arms import ArmsReport, Blocks, Suspect
from kvkeep.validate.report.matrix import columns_of
from kvkeep.validate.runner import Check, Judged, Phase
from kvkeep.validate.suite.base import NotApplicable, NotStarted, SuiteReport
from kvkeep.validate.verdict import PASSING, Verdict

EVIDENCE_MAX = 5
"""Failed requests shown in full; the JSON report has all of them."""
TEXT_CHARS_MAX = 160
COLORS = {
    "passed": "bold green",
    "failed": "bold red",
    "not-exercised": "bold yellow",
    "not-applicable": "bold cyan",
    "refused": "bold cyan",
}


def show_suite(report: SuiteReport, console: Console) -> None:
    """Print one run of a suite."""
    mode = "exact" if report.exact else f"A/A noise {report.noise_nats:.4f} nat"
    title = (
        f"{report.suite}, {report.mode.replace('-', ' ')} · {report.subject.title} · "
        f"{report.subject.capabilities.model} · "
        f"{report.sampling.max_tokens} tokens · scale {report.settings.scale}"
        + (f" · {mode}" if report.judges_answers else "")
    )
    if report.phases:
        console.print(_phase_table(title, report.phases))
    else:
        console.print(title)
    console.print(_check_table(report.checks))
    for name, value in report.numbers.items():
        console.print(f"  {escape(name)}: {_number(value)}", highlight=False)
    if report.judges_answers:
        _show_verdicts(report.judged, console)
    for suspect in report.suspects:
        _show_suspect(suspect, console)
    if not report.exact and report.cold_agreement:
        console.print(f"Against computed answers, for information: {_tally(report.cold_agreement)}")
    for name, path in report.files.items():
        console.print(f"Written: {escape(name)}: {escape(path)}", soft_wrap=True)
    console.print(f"[{COLORS[report.outcome]}]{report.outcome}[/]")


def show_missing(report: NotApplicable | NotStarted, console: Console) -> None:
    """Print why a suite, or one of its fleets, did not run."""
    name = f"{report.suite}, {report.mode}" if isinstance(report, NotStarted) else report.suite
    console.print(f"{name}: {escape(report.reason)}", soft_wrap=True)
    console.print(f"[{COLORS[report.outcome]}]{report.outcome}[/]")


def show_matrix(matrix: Mapping[str, Mapping[str, str]], console: Console) -> None:
    """Print the outcomes of several fleets, those of equal prefill engines in one row."""
    columns = columns_of(matrix)
    table = Table(title="prefill engines down, decode engines across", title_justify="left")
    for head in ("", *columns):
        table.add_column(head)
    for name, row in matrix.items():
        cells = [row.get(column, "-") for column in columns]
        table.add_row(name, *(f"[{COLORS.get(cell, 'dim')}]{cell}[/]" for cell in cells))
    console.print(table)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def show_arms(report: ArmsReport, console: Console) -> None:
    """Print one comparison of arms."""
    title = "arms, exact" if report.exact else "arms"
    console.print(_phase_table(title, [arm.phase for arm in report.arms]))
    console.print(_check_table([arm.check for arm in report.arms]))
    _show_verdicts(report.judged, console)
    console.print(f"[{COLORS[report.outcome]}]{report.outcome}[/]")


def _phase_table(title: str, phases: Sequence[Phase]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    for head in ("requests", "errors", "first token (median)", "from engine", "from outside"):
        table.add_column(head, justify="right")
    table.add_column("stored / loaded", justify="right")
    for phase in phases:
        shown = phase.to_dict()
        ttft_s = shown["ttft_s_median"]
        daemon = phase.delta.daemon
        moved = f"{daemon.get('blocks_stored', 0)} / {daemon.get('blocks_loaded', 0)}"
        table.add_row(
            phase.name,
            str(shown["requests"]),
            str(shown["errors"]),
            "-" if ttft_s is None else f"{ttft_s * 1000:.0f} ms",
            f"{phase.delta.local_hit_tokens} tok",
            f"{phase.delta.external_hit_tokens} tok",
            f"{moved} blocks" if daemon else "-",
        )
    return table


def _check_table(checks: Sequence[Check]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    signs = {
        True: "[green]ok[/]",
        False: "[red]FAILED[/]",
        None: "[dim]not checked[/]",
    }
    for check in checks:
        sign = "[yellow]NOT EXERCISED[/]" if check.gate and check.ok is False else signs[check.ok]
        table.add_row(sign, check.name, f"[dim]{escape(check.detail)}[/]")
    return table


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def _show_verdicts(judged: Sequence[Judged], console: Console) -> None:
    verdicts = [item.judgement.verdict for item in judged]
    counts = {verdict.value: verdicts.count(verdict) for verdict in Verdict}
    console.print(f"Verdicts: {_tally(counts)}")
    silent = PASSING | {Verdict.NOT_EXERCISED}
    failed = [item for item in judged if item.judgement.verdict not in silent]
    for item in failed[:EVIDENCE_MAX]:
        _show_evidence(item, console)
    if len(failed) > EVIDENCE_MAX:
        console.print(f"... and {len(failed) - EVIDENCE_MAX} more in the JSON report.")


def _show_evidence(item: Judged, console: Console) -> None:
    judgement = item.judgement
    console.print(
        f"[bold red]{judgement.verdict.value}[/] {item.phase}, request {item.index + 1} "
        f"({item.prompt.prompt_id}): {escape(judgement.reason)}"
    )
    if judgement.position is not None:
        console.print(
            f"  first difference at token {judgement.position}; "
            f"reference {escape(str(list(judgement.reference_top)))}, "
            f"answer {escape(str(list(judgement.candidate_top)))}"
        )
    for name, answer in (("reference", item.reference), ("answer", item.candidate)):
        console.print(f"  {name}: {escape(repr(answer.text[:TEXT_CHARS_MAX]))}")


def _show_suspect(suspect: Suspect, console: Console) -> None:
    """Where a wrong answer first goes wrong, and how often it does where."""
    console.print(f"[bold]{escape(suspect.prompt_id)}[/] asked again. {escape(suspect.sentence)}")
    told = [
        f"{tally.arm}{' (blocks of the run)' * (tally.blocks is Blocks.OF_THE_RUN)} "
        f"{tally.differed} of {tally.asked - tally.unproven}"
        for tally in suspect.tallies
    ]
    console.print(f"  wrong: {', '.join(told)}", highlight=False)
