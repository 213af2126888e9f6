"""What the router counts: tables of names and help texts, shown as JSON and to Prometheus.

Nothing is counted here: the parts keep plain integers, and are asked when somebody asks.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import kvkeep
from kvkeep.router.cartridges import metrics as cartridges
from kvkeep.router.events.source_counters import SourceCounters
from kvkeep.router.handoff import metrics as handoff
from kvkeep.router.limits.gate import REFUSALS
from kvkeep.router.policies.prefix_aware import PrefixAware
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.snapshot import Endpoint, EndpointState, Traffic

if TYPE_CHECKING:
    from kvkeep.router.run import Parts

TRAFFIC = {
    "num_done": ("requests_done", "requests that were answered with a status below 500"),
    "num_failed": ("requests_failed", "requests answered with another status, or not to the end"),
    "num_left": ("requests_left", "requests whose client left before the response was over"),
    "num_untold": ("requests_untold", "requests answered without a word about tokens (usage)"),
    "prompt_tokens": ("prompt_tokens", "prompt tokens, as engines reported them"),
    "completion_tokens": ("completion_tokens", "tokens that engines made, as they reported them"),
    "cached_tokens": ("cached_tokens", "prompt tokens that engines reported as not computed"),
    "request_bytes": ("request_bytes", "bytes of request bodies sent to engines"),
    "response_bytes": ("response_bytes", "bytes of responses that came from engines"),
}
"""Field of `Traffic` to name and help text.

In total each request of a client that was let in counts once, by what the client got; of an
endpoint, each time that something was sent there, retries and prefills among it.
"""

COUNTERS = {
    "retries": "times at which a request went to a further engine, under the retry budget",
    "malformed": "connections that sent what is not HTTP, or not as it is accepted here",
    "etcd_outages": "times at which etcd stopped answering",
    "etcd_entries_bad": "entries of etcd that were no engine",
    "engines_file_errors": "times at which the file of engines turned bad",
    "engine_starts": "times at which an engine was started on demand",
    "engine_starts_failed": "of these, starts that failed",
    "engine_stops": "times at which an idle engine was stopped",
    "prefixes_checked": "responses that told how much of the prompt their engine held",
    "prefixes_off": "of these, prompts of which the router believed otherwise by over one block",
    "prefixes_missing": "prompts routed by load because tokenizing them took or waited too long",
    "events_taken": "messages about blocks that were taken from engines",
    "events_gaps": "times at which messages of an engine were missing",
    "events_replayed": "messages that engines sent again",
    "events_dropped": "times at which all that was known of an engine was forgotten",
    "events_refused": "messages and events that were of no use: bad ones, other block lengths",
    "events_orphaned": "blocks told of that follow one which is not known",
    "events_losses": "times at which the connection to an engine's events was lost",
}
"""Name to help text; all are monotone integers. Prometheus adds ``kvkeep_router_``, ``_total``."""

GAUGES = {
    "requests_running": "requests that were let in and have not ended",
    "requests_waiting": "requests that wait for their turn",
    "requests_waiting_for_start": "requests that wait for an engine to start",
    "clients": "connections of clients",
    "upstream_connections": "connections to engines",
    "endpoints": "engines of the fleet, in whatever state",
    "endpoints_ready": "engines that requests may go to",
    "is_draining": "1 while the router takes no further request",
    "is_engines_file_good": "0 while the last good list of engines is used instead of the file's",
    "is_etcd_connected": "0 while the last known fleet is used instead of etcd's",
    "prefix_blocks": "different blocks that engines are known or thought to hold",
    "engines_heard": "engines whose block events are heard",
    "pool_blocks": "blocks that daemons keep and whose prompts are known",
    "pools_heard": "daemons whose block events are heard",
    "uptime_s": "seconds since the router started",
}
"""Name to help text."""

ENDPOINT_GAUGES = {
    "in_flight": "requests at an engine",
    "queued_tokens": "prompt tokens whose response has not begun, where a policy counts them",
    "ttft_s": "moving average of the seconds to the first byte",
    "is_ready": "1 while requests may go to an engine",
    "trips": "times at which an engine was left alone, since it joined",
    "prefix_blocks": "blocks that an engine is known or thought to hold",
    "is_heard": "1 while an engine's block events are heard",
}
"""Name to help text; one value for each endpoint."""

_CHOSEN = (EndpointState.READY, EndpointState.SUSPECT)


class RouterMetrics(Collector):
    """Reads what the parts of a router counted."""

    def __init__(self, parts: "Parts") -> None:
        self._parts = parts
        self._begun_s = parts.clock.now_s()

    def counters(self) -> dict[str, int]:
        """Every counter of the table."""
        parts, sources = self._parts, self._parts.sources
        etcd, file, desk = sources.etcd, sources.file, parts.relay.desk
        handoffs = parts.handoffs
        num_retries = 0 if handoffs is None else handoffs.prefill_router.num_retries
        return {
            "retries": num_retries + parts.router.num_retries,
            "malformed": parts.relay.num_malformed,
            "etcd_outages": 0 if etcd is None else etcd.num_outages,
            "etcd_entries_bad": 0 if etcd is None else etcd.view.num_bad,
            "engines_file_errors": 0 if file is None else file.num_errors,
            "engine_starts": 0 if desk is None else desk.num_starts,
            "engine_starts_failed": 0 if desk is None else desk.num_failed_starts,
            "engine_stops": 0 if desk is None else desk.num_stops,
            **self._prefix_counters(),
        }

    @property
    def _index(self) -> PrefixIndex | None:
        policy = self._parts.policy
        return policy.index if isinstance(policy, PrefixAware) else None

    def _prefix_counters(self) -> dict[str, int]:
        parts, index = self._parts, self._index
        told = SourceCounters() if parts.feeds is None else parts.feeds.counters
        return {
            "prefixes_checked": 0 if index is None else index.num_checked,
            "prefixes_off": 0 if index is None else index.num_off,
            "prefixes_missing": parts.relay.num_untokenized,
            "events_taken": told.num_batches,
            "events_gaps": told.num_gaps,
            "events_replayed": told.num_replayed,
            "events_dropped": told.num_dropped,
            "events_refused": told.num_refused + (0 if index is None else index.num_refused),
            "events_orphaned": 0 if index is None else index.num_orphans,
            "events_losses": told.num_losses,
        }

    def gauges(self) -> dict[str, float]:
        """What stands now."""
        desk = self._parts.relay.desk
        parts, sources, index = self._parts, self._parts.sources, self._index
        return {
            "requests_running": parts.gate.num_running,
            "requests_waiting": parts.gate.num_waiting,
            "requests_waiting_for_start": 0 if desk is None else desk.num_waiting,
            "clients": len(parts.relay.clients),
            "upstream_connections": parts.relay.num_upstream,
            "endpoints": len(parts.fleet),
            "endpoints_ready": self.num_ready,
            "is_draining": float(parts.relay.is_draining),
            "is_engines_file_good": float(sources.file is None or sources.file.is_good),
            "is_etcd_connected": float(sources.etcd is None or sources.etcd.is_connected),
            "prefix_blocks": 0 if index is None else len(index),
            "engines_heard": 0 if parts.feeds is None else parts.feeds.num_heard,
            "pool_blocks": 0 if index is None else len(index.pools),
            "pools_heard": 0 if parts.feeds is None else parts.feeds.num_pools_heard,
            "uptime_s": parts.clock.now_s() - self._begun_s,
        }

    @property
    def num_ready(self) -> int:
        """Endpoints that requests may go to."""
        return sum(endpoint.state in _CHOSEN for endpoint in self._parts.fleet)

    def workers(self) -> dict[str, Any]:
        """Everything a person or a script asks first: what ``GET /workers`` answers."""
        parts = self._parts
        return {
            "version": kvkeep.__version__,
            "policy": parts.policy.name,
            "decode_policy": None if parts.handoffs is None else parts.router.policy.name,
            "gauges": self.gauges(),
            "counters": self.counters(),
            "refused": dict(parts.gate.num_refused),
            "total": _traffic(parts.router.total),
            "workers": [self.worker(endpoint) for endpoint in parts.fleet],
            "handoff": None if parts.handoffs is None else handoff.told_of(parts.handoffs),
            "cartridges": self._cartridges(),
            "on_demand": [] if parts.relay.desk is None else parts.relay.desk.status(),
        }

    def _cartridges(self) -> dict[str, Any] | None:
        desk = self._parts.cartridges
        return None if desk is None else cartridges.told_of(desk, self._parts.fleet)

    def worker(self, endpoint: Endpoint) -> dict[str, Any]:
        """One endpoint."""
        parts, name = self._parts, endpoint.name
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        return {
            "name": name,
            "url": f"http://{host}:{endpoint.port}",
            "role": endpoint.role.value,
            "state": endpoint.state.value,
            "models": sorted(endpoint.models),
            "weight": endpoint.weight,
            "sources": parts.roster.sources_of(name),
            "is_leaving": parts.roster.is_leaving(name),
            "is_drained": parts.roster.is_drained(name),
            "age_s": parts.clock.now_s() - endpoint.joined_at_s,
            **self._endpoint_gauges(endpoint),
            **_traffic(endpoint.traffic),
        }

    def _endpoint_gauges(self, endpoint: Endpoint) -> dict[str, float]:
        feeds, index = self._parts.feeds, self._index
        return {
            "in_flight": endpoint.num_in_flight,
            "queued_tokens": endpoint.queued_tokens,
            "ttft_s": endpoint.ttft_s,
            "is_ready": int(endpoint.state in _CHOSEN),
            "trips": self._parts.book.num_trips(endpoint.name),
            "prefix_blocks": 0 if index is None else index.num_blocks(endpoint.name),
            "is_heard": int(feeds is not None and feeds.is_heard(endpoint.name)),
        }

    def collect(self) -> Iterator[Metric]:
        """Prometheus asks."""
        parts = self._parts
        total = _traffic(parts.router.total)
        for name, text in TRAFFIC.values():
            yield CounterMetricFamily(f"kvkeep_router_{name}", text, value=total[name])
        counters = self.counters()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"kvkeep_router_{name}", text, value=counters[name])
        refused = CounterMetricFamily(
            "kvkeep_router_refused", "requests refused by the router itself", labels=["code"]
        )
        for code in REFUSALS:
            refused.add_metric([code], parts.gate.num_refused[code])
        yield refused
        gauges = self.gauges()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"kvkeep_router_{name}", text, value=gauges[name])
        if parts.handoffs is not None:
            yield from handoff.collect(parts.handoffs)
        if parts.cartridges is not None:
            yield from cartridges.collect(parts.cartridges)
        yield from self._collect_endpoints(list(parts.fleet))

    def _collect_endpoints(self, endpoints: list[Endpoint]) -> Iterator[Metric]:
        labels = ["endpoint"]
        for field, (name, text) in TRAFFIC.items():
            counter = CounterMetricFamily(f"kvkeep_router_endpoint_{name}", text, labels=labels)
            for endpoint in endpoints:
                counter.add_metric([endpoint.name], getattr(endpoint.traffic, field))
            yield counter
        found = {endpoint.name: self._endpoint_gauges(endpoint) for endpoint in endpoints}
        for name, text in ENDPOINT_GAUGES.items():
            gauge = GaugeMetricFamily(f"kvkeep_router_endpoint_{name}", text, labels=labels)
            for endpoint_name, values in found.items():
                gauge.add_metric([endpoint_name], values[name])
            yield gauge


def metrics_table() -> str:
    """Every counter and gauge as Prometheus shows it, for docs/operations.md."""
    lines = ["| metric | kind | meaning |", "|---|---|---|"]
    for name, text in TRAFFIC.values():
        lines.append(f"| `kvkeep_router_{name}_total` | counter | {text} |")
    for name, text in COUNTERS.items():
        lines.append(f"| `kvkeep_router_{name}_total` | counter | {text} |")
    for code, text in REFUSALS.items():
        lines.append(f'| `kvkeep_router_refused_total{{code="{code}"}}` | counter | {text} |')
    lines += handoff.table_lines() + cartridges.table_lines()
    for name, text in GAUGES.items():
        lines.append(f"| `kvkeep_router_{name}` | gauge | {text} |")
    for name, _ in TRAFFIC.values():
        lines.append(
            f"| `kvkeep_router_endpoint_{name}_total{{endpoint}}` | counter "
            "| the same of what was sent to one engine, each attempt for itself |"
        )
    for name, text in ENDPOINT_GAUGES.items():
        lines.append(f"| `kvkeep_router_endpoint_{name}{{endpoint}}` | gauge | {text} |")
    return "\n".join(lines)


def _traffic(traffic: Traffic) -> dict[str, int]:
    return {name: getattr(traffic, field) for field, (name, _) in TRAFFIC.items()}
