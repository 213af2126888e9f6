"""What a router knows and counted of cartridges, as JSON and for Prometheus."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvkeep.router.cartridges.holders import TOLD
from kvkeep.router.cartridges.outcomes import FOUND
from kvkeep.router.snapshot import Fleet

if TYPE_CHECKING:
    from kvkeep.router.cartridges.desk import CartridgeDesk

PREFIX = "kvkeep_router_cartridge"
FAMILIES = {
    "_requests": ("found", FOUND, "requests, by what was found of cartridges in them"),
    "_choices": ("told", TOLD, "engines chosen for a cartridge, by why"),
}
"""Name behind ``PREFIX`` to label, its values and help text."""
KNOWN = f"{PREFIX}s_known"
ERRORS = f"{PREFIX}_registry_errors"
TEXTS = {
    KNOWN: "cartridges that requests may name",
    ERRORS: "times at which the registry of cartridges could not be read",
}


def told_of(desk: "CartridgeDesk", fleet: Fleet) -> dict[str, Any]:
    """For ``GET /workers``."""
    resident = {endpoint.name: desk.holders.resident_at(endpoint.name) for endpoint in fleet}
    return {
        "known": len(desk.catalogue),
        "requests": dict(desk.counts),
        "choices": dict(desk.holders.counts),
        "registry_errors": desk.num_errors,
        "resident": {
            name: None if found is None else sorted(found) for name, found in resident.items()
        },
    }


def collect(desk: "CartridgeDesk") -> Iterator[Metric]:
    """For Prometheus."""
    for (name, (label, _, text)), counts in zip(
        FAMILIES.items(), (desk.counts, desk.holders.counts), strict=True
    ):
        family = CounterMetricFamily(PREFIX + name, text, labels=[label])
        for value, count in counts.items():
            family.add_metric([value], count)
        yield family
    yield GaugeMetricFamily(KNOWN, TEXTS[KNOWN], value=len(desk.catalogue))
    yield CounterMetricFamily(ERRORS, TEXTS[ERRORS], value=desk.num_errors)


def table_lines() -> list[str]:
    """Rows of the table of all metrics."""
    lines = [
        f'| `{PREFIX}{name}_total{{{label}="{value}"}}` | counter | {text} |'
        for name, (label, values, _) in FAMILIES.items()
        for value, text in values.items()
    ]
    return [
        *lines,
        f"| `{KNOWN}` | gauge | {TEXTS[KNOWN]} |",
        f"| `{ERRORS}_total` | counter | {TEXTS[ERRORS]} |",
    ]
