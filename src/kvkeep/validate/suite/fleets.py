"""Runs a suite on fleets of its own, one after the other: each is gone before the next starts.

Blocking; if it is broken off, what runs is stopped first.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvkeep.model.errors import InputError, KvkeepError, UnavailableError
from kvkeep.validate.started import Started, last_lines_in, started_anew
from kvkeep.validate.suite.base import Fleet, NotStarted, Outcome, Report

CheckOne = Callable[[Fleet, Started], Sequence[Report]]
"""Judges a fleet that is up."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of one fleet, which is down again."""

    fleet: Fleet
    reports: Sequence[Report]
    took_s: float
    last_lines: Mapping[str, Sequence[str]]
    """The end of each process's log, by name."""


def run_on_fleets(
    suite: str, fleets: Sequence[Fleet], check: CheckOne, *, quiet: bool = False
) -> Iterator[Ran]:
    """Start, judge and stop one fleet after the other.

    Args:
        suite: Name of the suite.
        fleets: In their order.
        check: Judges one that is up.
        quiet: Show no progress of starts.
    """
    for fleet in fleets:
        began_s = time.perf_counter()
        reports = _run_one(suite, fleet, check, quiet=quiet)
        took_s = time.perf_counter() - began_s
        # Of a fleet that was refused there is nothing, or what an earlier one has left.
        is_refused = any(report.outcome == Outcome.REFUSED for report in reports)
        last_lines = {} if is_refused else last_lines_in(fleet.spec.state_path)
        yield Ran(fleet, reports, took_s, last_lines)


def _run_one(suite: str, fleet: Fleet, check: CheckOne, *, quiet: bool) -> Sequence[Report]:
    def not_started(outcome: Outcome, error: KvkeepError) -> list[Report]:
        return [NotStarted(suite, fleet.prefill, fleet.decode, outcome.value, str(error))]

    try:
        with started_anew(fleet.spec, quiet=quiet) as ready:
            try:
                return check(fleet, ready)
            except InputError as error:
                # It is up, and can't be asked: nobody has refused it.
                return not_started(Outcome.FAILED, error)
    except InputError as error:
        return not_started(Outcome.REFUSED, error)
    except UnavailableError as error:
        return not_started(Outcome.FAILED, error)
