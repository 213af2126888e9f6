"""A report in JUnit's XML, as CI systems read it: a suite for each run, a case for each promise.

What proves nothing is a failure here too: a CI must not show it as green.
"""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from kvkeep.validate.report.form import Check, Report, Request, Run
from kvkeep.validate.report.marks import Element, mark
from kvkeep.validate.report.whole_file import write_whole
from kvkeep.validate.verdict import Verdict

SKIPPED = ("not-applicable", "refused")
"""Outcomes that are neither a pass nor a failure."""
TEXT_CHARS_MAX = 4000
"""Of an answer in a failure's text."""


def write_junit(report: Report, path: Path) -> None:
    """Write the XML; folders are made, an old file is replaced at once.

    Raises:
        InputError: The place can't be written. What was there stays.
    """
    write_whole(junit(report), path)


def junit(report: Report) -> str:
    """The report in JUnit's XML."""
    root = mark("testsuites", *(_suite(run) for run in report.runs), name="kvkeep check")
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def _suite(run: Run) -> Element:
    cases = [_outcome(run), *_checks(run), *_requests(run)]
    counts = {
        name: sum(case.find(found) is not None for case in cases)
        for name, found in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    seconds = sum(phase.wall_s or 0.0 for phase in run.all_phases)
    time = f"{seconds:.3f}"
    return mark("testsuite", *cases, name=run.title, tests=len(cases), time=time, **counts)


def _outcome(run: Run) -> Element:
    """So that a run without one request is seen too."""
    case = mark("testcase", classname=run.title, name="outcome")
    if run.outcome in SKIPPED:
        case.append(mark("skipped", message=run.reason))
    elif not run.passed:
        message = run.reason or f"The run ended as {run.outcome}."
        case.append(mark("failure", type=run.outcome, message=message))
    return case


def _checks(run: Run) -> Iterator[Element]:
    for check in run.all_checks:
        case = mark("testcase", classname=run.title, name=f"check: {check.name}")
        if check.ok is None:
            case.append(mark("skipped", message=check.detail))
        elif not check.ok:
            case.append(_failed_check(check))
        yield case


def _failed_check(check: Check) -> Element:
    kind = Verdict.NOT_EXERCISED.value if check.gate else "failed"
    return mark("failure", type=kind, message=check.detail)


def _requests(run: Run) -> Iterator[Element]:
    for request in run.all_requests:
        name = f"{request.phase}, request {request.index + 1}: {request.prompt_id}"
        seconds = request.candidate.total_s
        time = None if seconds is None else f"{seconds:.3f}"
        case = mark("testcase", classname=run.title, name=name, time=time)
        if not request.passes:
            case.append(_failure(request))
        yield case


def _failure(request: Request) -> Element:
    tag = "error" if request.verdict == Verdict.ERROR.value else "failure"
    lines = [request.reason]
    if request.position is not None:
        lines.append(f"first difference at token {request.position}")
    for name, answer in (("reference", request.reference), ("answer", request.candidate)):
        lines.append(f"{name}: {answer.text[:TEXT_CHARS_MAX]}")
    return mark(tag, "\n".join(lines), type=request.verdict, message=request.reason)
