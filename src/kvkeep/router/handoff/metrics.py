"""A router's hand-offs as JSON and for Prometheus."""

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, Metric

from kvkeep.router.handoff.counts import COUNTERS, OUTCOMES
from kvkeep.router.handoff.desk import HandOffDesk
from kvkeep.router.handoff.plan import SKIPS

PREFIX = "kvkeep_router_handoff"
FAMILIES = {
    "s": "requests that were to be handed off, by how they ended",
    "_skips": "requests that a decode engine did alone because they were not to be handed off",
    "_fallbacks": "prompts that a decode engine computed because of a failure, by which",
    "_states": "how often a state of hand-offs was left",
    "_seconds": "how long hand-offs were in a state, all together",
}
"""Name behind ``PREFIX`` to help text."""


def told_of(desk: HandOffDesk) -> dict[str, Any]:
    """For ``GET /workers``."""
    counts = desk.counts
    return {
        "transport": desk.transport.name,
        "outcomes": dict(counts.outcomes),
        "skips": dict(counts.skips),
        "fallbacks": dict(counts.fallbacks),
        "released": counts.num_released,
        "unreleased": counts.num_unreleased,
        "seconds": {state.value: seconds for state, seconds in counts.spent_s.items() if seconds},
    }


def collect(desk: HandOffDesk) -> Iterator[Metric]:
    """For Prometheus."""
    counts, transport = desk.counts, desk.transport.name
    ended = _family("s", "transport", "outcome")
    for outcome, count in counts.outcomes.items():
        ended.add_metric([transport, outcome], count)
    yield ended
    skips = _family("_skips", "reason")
    for reason, count in counts.skips.items():
        skips.add_metric([reason], count)
    yield skips
    fallbacks = _family("_fallbacks", "label")
    for label, count in counts.fallbacks.items():
        fallbacks.add_metric([label], count)
    yield fallbacks
    states, seconds = _family("_states", "state"), _family("_seconds", "state")
    for state, count in counts.visits.items():
        states.add_metric([state.value], count)
        seconds.add_metric([state.value], counts.spent_s[state])
    yield states
    yield seconds
    values = {"released": counts.num_released, "unreleased": counts.num_unreleased}
    for name, text in COUNTERS.items():
        yield CounterMetricFamily(f"{PREFIX}_offers_{name}", text, value=values[name])


def _family(name: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, FAMILIES[name], labels=labels)


def table_lines() -> list[str]:
    """Rows of the table of all metrics."""
    lines = [
        f'| `{PREFIX}s_total{{transport,outcome="{outcome}"}}` | counter | {text} |'
        for outcome, text in OUTCOMES.items()
    ]
    lines += [
        f'| `{PREFIX}_skips_total{{reason="{reason}"}}` | counter | {text} |'
        for reason, text in SKIPS.items()
    ]
    labels = {"_fallbacks": "label", "_states": "state", "_seconds": "state"}
    lines += [
        f"| `{PREFIX}{name}_total{{{label}}}` | counter | {FAMILIES[name]} |"
        for name, label in labels.items()
    ]
    lines += [
        f"| `{PREFIX}_offers_{name}_total` | counter | {text} |" for name, text in COUNTERS.items()
    ]
    return lines
