"""What changed between two reports: verdicts, latency and served share, request by request. Pure.

Requests are compared with themselves: the same suite, phase, prompt and place in both reports. Two
averages that lie near each other prove nothing, and two that lie apart may be one slow request.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvkeep.validate.report.form import Report, Request, Run
from kvkeep.validate.statistics import Paired, compare_pairs

FORM = "kvkeep.check.diff/1"
SURE = 0.01
"""A difference in latency that chance makes more seldom than this counts as one."""

Name = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One request whose verdict is another."""

    run: str
    phase: str
    prompt_id: str
    index: int
    before: str
    after: str
    is_worse: bool
    """It passed before and does not now."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Times to the first token of one phase, each request against itself."""

    run: str
    phase: str
    pairs: int
    median_ratio: float
    """Median of after over before: 1.1 is a tenth slower."""
    faster: int
    """Requests that took less time than before."""
    slower: int
    p: float
    """How often chance alone makes so uneven a count of faster and slower (exact sign test)."""

    @property
    def is_sure(self) -> bool:
        """Whether it is more than chance."""
        return self.p < SURE


@dataclass(frozen=True, slots=True)
class Share:
    """Served share of one replay."""

    run: str
    arm: str
    """Empty where the run has no arms."""
    before: float | None
    after: float | None
    share_min: float | None

    @property
    def is_worse(self) -> bool:
        """It proved something before and does not now."""
        least = self.share_min or 0.0
        return (self.before or 0.0) >= least > (self.after or 0.0)


@dataclass(frozen=True, slots=True)
class Moved:
    """A run or a check whose outcome is another."""

    run: str
    what: str
    before: str
    after: str
    is_worse: bool


@dataclass(frozen=True, slots=True)
class RunDiff:
    """One run against the same run of the other report."""

    run: str
    pairs: int
    """Requests that both have."""
    only_before: int
    only_after: int
    broken: int
    """Passed before and do not now."""
    mended: int
    """The other way round."""
    p: float
    """How often chance alone makes so uneven a count of broken and mended (exact McNemar)."""


@dataclass(frozen=True, slots=True)
class ReportDiff:
    """Everything that changed."""

    runs: tuple[RunDiff, ...]
    missing: tuple[str, ...]
    """Runs of the first report that the second lacks."""
    added: tuple[str, ...]
    moved: tuple[Moved, ...]
    changes: tuple[Change, ...]
    shares: tuple[Share, ...]
    """Of every replay that both have."""
    latencies: tuple[Latency, ...]
    """Of every phase that both have."""

    def slower_than(self, ratio: float) -> list[Latency]:
        """Phases that are surely slower, by more than this ratio."""
        return [each for each in self.latencies if each.is_sure and each.median_ratio > ratio]

    @property
    def is_worse(self) -> bool:
        """Whether anything that held before does not hold now; latency is no part of this."""
        return (
            bool(self.missing)
            or any(change.is_worse for change in self.changes)
            or any(share.is_worse for share in self.shares)
            or any(moved.is_worse for moved in self.moved)
            or any(run.only_before for run in self.runs)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, documented in docs/check-report.md."""
        return {"schema": FORM, "worse": self.is_worse, **asdict(self)}


def compare_reports(before: Report, after: Report) -> ReportDiff:
    """Compare two reports, run by run and request by request."""
    first, second = _by_name(before), _by_name(after)
    pairs = [(run, second[name]) for name, run in first.items() if name in second]
    return ReportDiff(
        runs=tuple(_compare_runs(*pair) for pair in pairs),
        missing=tuple(run.title for name, run in first.items() if name not in second),
        added=tuple(run.title for name, run in second.items() if name not in first),
        moved=tuple(moved for pair in pairs for moved in _moved(*pair)),
        changes=tuple(change for pair in pairs for change in _changes(*pair)),
        shares=tuple(share for pair in pairs for share in _shares(*pair)),
        latencies=tuple(latency for pair in pairs for latency in _latencies(*pair)),
    )


def _by_name(report: Report) -> dict[Name, Run]:
    """Runs by what they ran; equal ones are told apart by their order."""
    found: dict[Name, Run] = {}
    times: Counter[str] = Counter()
    for run in report.runs:
        found[run.title, str(times[run.title])] = run
        times[run.title] += 1
    return found


def _requests(run: Run) -> dict[Name, Request]:
    found: dict[Name, Request] = {}
    times: Counter[Name] = Counter()
    for request in run.all_requests:
        name = (request.phase, request.prompt_id, str(request.index))
        found[*name, str(times[name])] = request
        times[name] += 1
    return found


def _pairs(before: Run, after: Run) -> Iterator[tuple[Request, Request]]:
    second = _requests(after)
    for name, request in _requests(before).items():
        if name in second:
            yield request, second[name]


def _compare_runs(before: Run, after: Run) -> RunDiff:
    first, second = _requests(before), _requests(after)
    pairs = list(_pairs(before, after))
    paired = compare_pairs([one.passes for one, _ in pairs], [other.passes for _, other in pairs])
    return RunDiff(
        run=before.title,
        pairs=len(pairs),
        only_before=len(first.keys() - second.keys()),
        only_after=len(second.keys() - first.keys()),
        broken=paired.only_reference,
        mended=paired.only_candidate,
        p=paired.p_value,
    )


def _moved(before: Run, after: Run) -> Iterator[Moved]:
    if before.outcome != after.outcome:
        is_worse = before.passed and not after.passed
        yield Moved(before.title, "outcome", before.outcome, after.outcome, is_worse)
    checks = {check.name: check.ok for check in after.all_checks}
    for check in before.all_checks:
        now = checks.get(check.name)
        if now is not check.ok:
            said = (_said(check.ok), _said(now))
            yield Moved(before.title, f"check: {check.name}", *said, check.ok is True)


def _said(ok: bool | None) -> str:
    return {True: "ok", False: "failed", None: "not checked"}[ok]


def _changes(before: Run, after: Run) -> Iterator[Change]:
    for one, other in _pairs(before, after):
        if one.verdict != other.verdict:
            yield Change(
                run=before.title,
                phase=one.phase,
                prompt_id=one.prompt_id,
                index=one.index,
                before=one.verdict,
                after=other.verdict,
                is_worse=one.passes and not other.passes,
            )


def _shares(before: Run, after: Run) -> Iterator[Share]:
    now = after.all_served
    for arm, served in before.all_served.items():
        if arm in now:
            least = now[arm].share_min
            yield Share(before.title, arm, served.share, now[arm].share, least)


def _latencies(before: Run, after: Run) -> Iterator[Latency]:
    by_phase: dict[str, list[tuple[float, float]]] = {}
    for one, other in _pairs(before, after):
        times = one.candidate.ttft_s, other.candidate.ttft_s
        if times[0] and times[1]:
            by_phase.setdefault(one.phase, []).append((times[0], times[1]))
    for phase, pairs in by_phase.items():
        yield _latency(before.title, phase, pairs)


def _latency(run: str, phase: str, pairs: Sequence[tuple[float, float]]) -> Latency:
    faster = sum(now < then for then, now in pairs)
    slower = sum(now > then for then, now in pairs)
    return Latency(
        run=run,
        phase=phase,
        pairs=len(pairs),
        median_ratio=statistics.median(now / then for then, now in pairs),
        faster=faster,
        slower=slower,
        # The sign test asks the same binomial question as McNemar's.
        p=Paired(0, faster, slower, 0).p_value,
    )
