"""Takes out of a report what the plots show. Pure; nothing here draws."""

from collections.abc import Callable, Iterable, Iterator

from kvkeep.validate.counters import EXTERNAL_HITS, LOCAL_HITS, LOCAL_QUERIES
from kvkeep.validate.report.form import Answer, Phase, Request, Run

REFERENCE = "reference"
"""Answers that others were judged against and that were not judged themselves."""
COMPUTED, ENGINE, OUTSIDE, POOL, LOWER = (
    "computed",
    "the engine's own cache",
    "outside the engine",
    "kvkeep's pool",
    "lower tiers",
)
PLACES = (COMPUTED, ENGINE, OUTSIDE, POOL, LOWER)
"""Where prompt tokens can come from, in the order of the bars."""


def answers_by_phase(requests: Iterable[Request]) -> dict[str, list[Answer]]:
    """Each answer once, by the phase it was given in; references that no phase has come first."""
    requests = list(requests)
    found: dict[str, list[Answer]] = {}
    judged = {_identity(request, request.candidate) for request in requests}
    references = {
        _identity(request, request.reference): request.reference
        for request in requests
        if _identity(request, request.reference) not in judged
    }
    known = [answer for answer in references.values() if answer.error is None]
    if any(answer.ttft_s is not None for answer in known):
        found[REFERENCE] = known
    for request in requests:
        found.setdefault(request.phase, []).append(request.candidate)
    return found


def _identity(request: Request, answer: Answer) -> tuple[str, float | None, float | None]:
    """Two answers to one prompt that took the same time to the nanosecond are one."""
    return request.prompt_id, answer.ttft_s, answer.total_s


def ttft_s(run: Run) -> dict[str, list[float]]:
    """Seconds to the first token by phase; a phase without any is left out."""
    return _known(run, lambda answer: answer.ttft_s)


def total_s(run: Run) -> dict[str, list[float]]:
    """Seconds to the last byte by phase; a phase without any is left out."""
    return _known(run, lambda answer: answer.total_s)


def _known(run: Run, take: Callable[[Answer], float | None]) -> dict[str, list[float]]:
    found = {
        phase: [value for answer in answers if (value := take(answer)) is not None]
        for phase, answers in answers_by_phase(run.all_requests).items()
    }
    return {phase: values for phase, values in found.items() if values}


def ttft_by_length(run: Run) -> dict[str, list[tuple[float, float]]]:
    """Prompt tokens and seconds to the first token by phase."""
    found = {
        phase: [
            (float(answer.prompt_tokens), answer.ttft_s)
            for answer in answers
            if answer.prompt_tokens and answer.ttft_s is not None
        ]
        for phase, answers in answers_by_phase(run.all_requests).items()
    }
    return {phase: points for phase, points in found.items() if points}


def served_tokens(run: Run) -> dict[str, dict[str, float]]:
    """Prompt tokens by phase and the place they came from; phases without counters are left out."""
    capabilities = run.subject.get("capabilities")
    block_tokens = capabilities.get("block_tokens") if isinstance(capabilities, dict) else None
    rows = ((phase.name, _places(phase, block_tokens)) for phase in run.all_phases)
    return {name: places for name, places in rows if sum(places.values())}


def _places(phase: Phase, block_tokens: object) -> dict[str, float]:
    counted = phase.counters.engine
    asked, local = counted.get(LOCAL_QUERIES, 0.0), counted.get(LOCAL_HITS, 0.0)
    outside = counted.get(EXTERNAL_HITS, 0.0)
    places = {COMPUTED: max(0.0, asked - local - outside), ENGINE: local}
    if not phase.counters.daemon or not isinstance(block_tokens, int):
        return {**places, OUTSIDE: outside}
    # What came from below had to pass through the pool first.
    promoted = phase.counters.daemon.get("blocks_promoted", 0) * block_tokens
    lower = min(outside, float(promoted))
    return {**places, POOL: outside - lower, LOWER: lower}


def verdicts_in_order(run: Run) -> dict[str, list[tuple[str, str]]]:
    """By phase, for each request its verdict and one line about it, in the order of asking."""
    lanes: dict[str, list[tuple[int, str, str]]] = {}
    for request in run.all_requests:
        told = f"{request.phase}, request {request.index + 1} ({request.prompt_id})"
        line = f"{told}: {request.verdict}. {request.reason}"
        lanes.setdefault(request.phase, []).append((request.index, request.verdict, line))
    return {
        phase: [(verdict, line) for _, verdict, line in sorted(lane, key=lambda cell: cell[0])]
        for phase, lane in lanes.items()
    }


def failed_first(run: Run) -> Iterator[Request]:
    """Every request: those that do not pass, then the others, each in the order of the file."""
    yield from (request for request in run.all_requests if not request.passes)
    yield from (request for request in run.all_requests if request.passes)
