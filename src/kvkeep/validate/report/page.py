"""One HTML page of a report that needs nothing but itself: no script, nothing fetched.

Its policy allows one style sheet, its own, named by digest. So even markup that got past the
escaping could neither run, nor load, nor send anything.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

from kvkeep.validate.report import charts, figures
from kvkeep.validate.report.form import Check, Report, Request, Run
from kvkeep.validate.report.marks import Child, Element, mark, text_of
from kvkeep.validate.report.matrix import columns_of
from kvkeep.validate.report.whole_file import write_whole

FAILED_SHOWN_MAX = 100
"""Requests shown with both answers; the JSON report has all."""
REQUESTS_SHOWN_MAX = 500
"""Rows of the table of all requests."""
TEXT_CHARS_MAX = 4000
"""Of an answer; a model that does not stop shall not make the page unreadable."""
_SIGNS = {True: "ok", False: "FAILED", None: "not checked"}
_CLASSES = {True: "passed", False: "failed", None: "soft"}


def write_page(report: Report, path: Path) -> None:
    """Write the page; folders are made, an old page is replaced at once.

    Raises:
        InputError: The place can't be written. What was there stays.
    """
    write_whole(page(report), path)


def page(report: Report) -> str:
    """The page of a report."""
    outcome = "passed" if report.passed else "did not pass"
    title = f"kvkeep check: {outcome}"
    style = files("kvkeep.validate.report").joinpath("style.css").read_text("utf-8")
    body = mark("body", mark("h1", title), _summary(report), *_matrix(report))
    for run in report.runs:
        body.extend(_run_parts(run))
    body.extend(_logs(report))
    root = mark("html", _head(title, style), body, lang="en")
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, "unicode", method="html") + "\n"


def _head(title: str, style: str) -> Element:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; form-action 'none'"
    return mark(
        "head",
        mark("meta", charset="utf-8"),
        ElementTree.Element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        mark("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # A browser would ask the server for an icon.
        mark("link", rel="icon", href="data:,"),
        mark("title", title),
        mark("style", style),
    )


def _summary(report: Report) -> Element:
    rows: list[list[Child]] = []
    for run in report.runs:
        requests = run.all_requests
        failed = sum(not request.passes for request in requests)
        served = [served.share for served in run.all_served.values() if served.share is not None]
        share = f"{min(served):.0%}" if served else "-"
        outcome = mark("span", run.outcome, class_=f"outcome {run.outcome}")
        rows.append([run.title, outcome, str(len(requests)), str(failed), share])
    heads = ("run", "outcome", "judged requests", "not passed", "served share")
    return _table(heads, rows, numbers_from=2)


def _matrix(report: Report) -> Iterator[Element]:
    """Outcomes of several fleets: a row for each kind of prefill engines."""
    if not report.matrix:
        return
    columns = columns_of(report.matrix)
    rows: list[list[Child]] = []
    for name, row in report.matrix.items():
        cells = [row.get(column, "-") for column in columns]
        rows.append([name, *(mark("span", cell, class_=f"outcome {cell}") for cell in cells)])
    yield mark("h2", "Prefill engines by decode engines")
    yield _table(("", *columns), rows)


def _run_parts(run: Run) -> Iterator[Element]:
    yield mark("h2", run.title)
    yield mark("p", mark("span", run.outcome, class_=f"outcome {run.outcome}"))
    yield mark("p", _about(run), class_="soft")
    if run.reason:
        yield mark("p", run.reason)
    plots = list(_plots(run))
    if plots:
        yield mark("div", *plots, class_="plots")
    else:
        yield mark("p", "No request was judged, so there is nothing to plot.", class_="soft")
    if run.all_checks:
        yield _checks(run.all_checks)
    yield from _named("Measured", "number", run.numbers)
    yield from _failed(run)
    yield from _suspects(run)
    yield from _all_requests(run)
    yield from _named("Settings", "setting", {**run.sampling, **run.settings, **run.sizes})


def _about(run: Run) -> str:
    capabilities = run.subject.get("capabilities")
    capabilities = capabilities if isinstance(capabilities, dict) else {}
    parts = [
        str(run.subject.get("title") or ""),
        str(capabilities.get("model") or ""),
        str(run.subject.get("url") or ""),
        f"A/A noise {run.noise_nats:.4f} nat" if run.noise_nats is not None else "",
        f"sizes {run.scale}" if run.scale else "",
        f"prompts from {run.data}" if run.data else "",
        f"{run.took_s:.0f} s" if run.took_s is not None else "",
        f"run {run.run_id}" if run.run_id else "",
    ]
    return " · ".join(part for part in parts if part)


# ---- plots


def _plots(run: Run) -> Iterator[Element]:
    for heading, values in (
        ("Time to the first token", figures.ttft_s(run)),
        ("Time to the last byte", figures.total_s(run)),
    ):
        if values:
            caption = "Share of requests that took at most so long; further left is faster."
            drawn = charts.distribution(f"{heading}, as a distribution", values)
            yield _figure(heading, caption, drawn, list(values), _quantiles(values))
    points = figures.ttft_by_length(run)
    if points:
        drawn = charts.scatter("Time to the first token by length", points, "prompt tokens")
        caption = "One dot for each request."
        table = _quantiles({name: [dot[1] for dot in dots] for name, dots in points.items()})
        yield _figure("First token by prompt length", caption, drawn, list(points), table)
    places = figures.served_tokens(run)
    if places:
        parts = [part for part in figures.PLACES if any(row.get(part) for row in places.values())]
        drawn = charts.shares("Where prompt tokens came from", places, parts)
        caption = "Share of prompt tokens by the place they came from, in each phase."
        rows = [
            [name, *(f"{row.get(part, 0):,.0f}" for part in parts)] for name, row in places.items()
        ]
        table = _table(("phase", *parts), rows, numbers_from=1)
        yield _figure("Served share by tier", caption, drawn, parts, table)
    lanes = figures.verdicts_in_order(run)
    if lanes:
        yield _verdicts(lanes)


def _verdicts(lanes: Mapping[str, Sequence[tuple[str, str]]]) -> Element:
    present = [
        verdict
        for verdict in charts.SEVERITY
        if any(cell[0] == verdict for lane in lanes.values() for cell in lane)
    ]
    rows = [
        [name, *(str(sum(cell[0] == verdict for cell in lane)) for verdict in present)]
        for name, lane in lanes.items()
    ]
    return mark(
        "figure",
        mark("h3", "Verdicts in the order of asking"),
        mark("figcaption", "One cell for each request; a cell's tooltip says why."),
        charts.timeline("Verdict of each request, by phase", lanes),
        charts.legend(present, "v-"),
        _numbers(_table(("phase", *present), rows, numbers_from=1)),
    )


def _figure(
    heading: str, caption: str, drawn: Element, names: Sequence[str], table: Element
) -> Element:
    return mark(
        "figure",
        mark("h3", heading),
        mark("figcaption", caption),
        drawn,
        charts.legend(names),
        _numbers(table),
    )


def _numbers(table: Element) -> Element:
    return mark("details", mark("summary", "Numbers", class_="soft"), table)


def _quantiles(series: Mapping[str, Sequence[float]]) -> Element:
    rows: list[list[Child]] = []
    for name, values in series.items():
        ordered = sorted(values)
        at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9)]
        shown = [ordered[0], *at, ordered[-1]]
        rows.append([name, str(len(ordered)), *(text_of(value) for value in shown)])
    heads = ("phase", "requests", "least (s)", "median (s)", "9 of 10 (s)", "most (s)")
    return _table(heads, rows, numbers_from=1)


# ---- tables


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[Child]], *, numbers_from: int = 99
) -> Element:
    """A table that scrolls by itself where it is wider than the page."""
    head = mark("tr", *(mark("th", name, scope="col") for name in heads))
    body = [
        mark(
            "tr",
            *(
                mark("td", cell, class_="number" if idx >= numbers_from else None)
                for idx, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    whole = mark("table", mark("thead", head), mark("tbody", *body))
    return mark("div", whole, class_="wide")


def _checks(checks: Sequence[Check]) -> Element:
    rows: list[list[Child]] = []
    for check in checks:
        idle = check.gate and check.ok is False
        sign = "NOT EXERCISED" if idle else _SIGNS[check.ok]
        name = "not-exercised" if idle else _CLASSES[check.ok]
        rows.append([mark("span", sign, class_=f"outcome {name}"), check.name, check.detail])
    return _table(("", "check", "what was found"), rows)


def _failed(run: Run) -> Iterator[Element]:
    failed = [request for request in run.all_requests if not request.passes]
    if not failed:
        return
    parts: list[Child] = [mark("summary", f"Requests that did not pass ({len(failed)})")]
    for request in failed[:FAILED_SHOWN_MAX]:
        parts += _evidence(request)
    if len(failed) > FAILED_SHOWN_MAX:
        rest = len(failed) - FAILED_SHOWN_MAX
        parts.append(mark("p", f"and {rest} more in the JSON report", class_="soft"))
    details = mark("details", *parts)
    details.set("open", "open")
    yield details


def _evidence(request: Request) -> Iterator[Element]:
    told = f" {request.phase}, request {request.index + 1} ({request.prompt_id}): {request.reason}"
    yield mark("p", mark("span", request.verdict, class_="outcome failed"), told)
    if request.position is not None:
        best = f"reference {request.reference_top2}, answer {request.candidate_top2}"
        yield mark("p", f"First difference at token {request.position}; {best}", class_="soft")
    for name, answer in (("reference", request.reference), ("answer", request.candidate)):
        said = answer.text[:TEXT_CHARS_MAX] if answer.error is None else answer.error
        yield mark("pre", f"{name}: {said}")


def _suspects(run: Run) -> Iterator[Element]:
    """What was asked again in every arm, and where it is first wrong."""
    if not run.suspects:
        return
    parts: list[Child] = [mark("summary", f"Asked again ({len(run.suspects)})")]
    for suspect in run.suspects:
        parts.append(mark("p", f"{suspect.prompt_id} ({suspect.phase}). {suspect.sentence}"))
        rows = [
            [each.arm, each.blocks, str(each.asked), str(each.differed), str(each.unproven)]
            for each in suspect.tallies
        ]
        heads = ("arm", "blocks", "asked", "wrong", "not proven")
        parts.append(_table(heads, rows, numbers_from=2))
    details = mark("details", *parts)
    details.set("open", "open")
    yield details


def _all_requests(run: Run) -> Iterator[Element]:
    requests = run.all_requests
    if not requests:
        return
    rows = [_row(request) for request in islice(figures.failed_first(run), REQUESTS_SHOWN_MAX)]
    heads = (
        *("phase", "prompt", "verdict", "first token (s)", "last byte (s)", "prompt tokens"),
        "reused tokens",
    )
    title = f"All requests ({len(requests)})"
    if len(requests) > REQUESTS_SHOWN_MAX:
        title += f", the first {REQUESTS_SHOWN_MAX}; the JSON report has all"
    yield mark("details", mark("summary", title), _table(heads, rows, numbers_from=3))


def _row(request: Request) -> list[str]:
    answer = request.candidate
    times = [_seconds(answer.ttft_s), _seconds(answer.total_s)]
    counts = [_count(answer.prompt_tokens), _count(answer.cached_tokens)]
    return [request.phase, request.prompt_id, request.verdict, *times, *counts]


def _seconds(value: float | None) -> str:
    return "-" if value is None else text_of(value)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _named(title: str, head: str, values: Mapping[str, object]) -> Iterator[Element]:
    if values:
        rows = [[name, _value(value)] for name, value in _flat(values)]
        yield mark("details", mark("summary", title), _table((head, "value"), rows))


def _flat(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Names and values, those of a mapping one by one behind its name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}, {inner}", each) for inner, each in _flat(value))
        else:
            yield name, value


def _value(value: object) -> str:
    return text_of(value) if isinstance(value, float) else str(value)


def _logs(report: Report) -> Iterator[Element]:
    for name, lines in report.logs.items():
        title = mark("summary", f"Last lines of {name}")
        yield mark("details", title, mark("pre", "\n".join(lines)))
