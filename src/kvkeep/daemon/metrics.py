"""What the daemon counts: one table of names and help texts, shown as JSON and to Prometheus.

The ledger keeps its own counters; those of copies come from the workers' reports, because only a
worker sees bytes arrive.
"""

import json
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import kvkeep
from kvkeep.daemon.cartridges.residents import Residents
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.sequences.listener import SequenceListener
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import Clock

COUNTERS = {
    "blocks_stored": "blocks that became readable in the pool",
    "blocks_loaded": "blocks that arrived in an engine with right digests",
    "blocks_lent": "blocks lent for reading",
    "blocks_evicted": "blocks that made room for others",
    "blocks_corrupt": "blocks whose bytes did not match their digests",
    "bytes_stored": "bytes of the blocks stored",
    "bytes_loaded": "bytes of the blocks loaded",
    "store_us": "microseconds that workers spent copying to the pool",
    "load_us": "microseconds that workers spent copying from the pool and checking",
    "blocks_declined": "blocks that were lent and not loaded: the engine computes them sooner",
    "load_failures": "blocks that were lent but did not arrive, and were recomputed",
    "blocks_promoted": "blocks read from a lower tier into the pool",
    "promotions_failed": "blocks that a lower tier was to deliver and did not",
    "promotions_late": "requests answered before the blocks that they waited for had come",
    "prefetches_asked": "prefixes that were to be brought to the pool before a request asks",
    "prefetches_brought": "of those, how many made more blocks readable",
    "prefetches_refused": "of those, how many were too many at once",
    "promotion_saved_us": "microseconds of computing that promotions saved, as estimated",
    "blocks_cascaded": "blocks written to a lower tier, once for each tier",
    "cascades_too_late": "blocks that were evicted before they could be written to a lower tier",
    "cascades_refused": "blocks that a lower tier was not asked to keep, or failed to",
    "tier_proofs_failed": "tiers that gave back other bytes than they were given: switched off",
    "leases_granted": "leases for reading and writing",
    "leases_expired": "leases that ended at their deadline",
    "stores_fenced": "commits refused because their lease was over",
    "stores_without_room": "blocks not stored because every slot was in use",
    "lookups": "requests for the longest readable prefix",
    "lookup_blocks": "blocks asked for in them",
    "blocks_recovered": "blocks taken over from an earlier daemon",
    "blocks_dropped": "torn or rotten blocks found then",
    "messages_refused": "messages that were malformed or out of order",
    "sessions_cut": "sessions ended because the client did not read its answers",
    "handoffs_offered": "prompts whose blocks a prefill engine named to a decode engine",
    "handoffs_not_offered": "prompts of which a prefill engine could name no block",
    "handoffs_whole": "requests whose decode engine found every block that was named to it",
    "handoffs_partial": "requests whose decode engine had to compute blocks that were named to it",
    "handoffs_refused": "requests whose ticket was malformed or named another prompt's blocks",
    "handoff_blocks_missed": "blocks that were named and had not come in time",
    "handoff_wait_us": "microseconds that decode engines' requests waited for blocks named to them",
    "device_to_host": "blocks moved from an engine to the pool",
    "host_to_device": "blocks moved from the pool to an engine",
}
"""Name to help text; all are monotone integers. Prometheus adds ``kvkeep_`` and ``_total``."""

GAUGES = {
    "slots": "places for a block in the pool",
    "slots_free": "slots that can be written at once",
    "slots_writing": "slots that are being filled, one per worker for its canary among them",
    "slots_ready": "slots with a readable block",
    "slots_doomed": "slots whose block is gone for new readers and still lent to earlier ones",
    "slots_fenced": "slots out of use until their writer is proven quiet",
    "read_leases": "leases for reading that run",
    "write_leases": "leases for writing that run",
    "workers": "sessions of workers, one per rank",
    "sessions": "sessions of any kind",
    "uptime_s": "seconds since the daemon started",
}
"""Name to help text."""

TENANT_GAUGES = {
    "tenant_blocks": "blocks in the pool of a tenant with a quota; `others`: of all without",
    "tenant_quota_blocks": "blocks that a tenant can count on",
}
"""Name to help text; one value for each tenant that the settings name, and one for all others."""


class Metrics(Collector):
    """Counts, and renders what it and the ledger counted."""

    def __init__(self, shell: Shell, clock: Clock) -> None:
        self._shell = shell
        self._clock = clock
        self._begun_s = clock.now_s()
        self._own = dict.fromkeys(COUNTERS, 0)
        self.movement: Movement | None = None
        self.sequences: SequenceListener | None = None
        self.residents = Residents(shell)
        self.num_sessions = 0
        """Kept by the server."""

    def count(self, name: str, amount: int = 1) -> None:
        """Add to one of the daemon's own counters."""
        self._own[name] += amount

    def _block_bytes(self) -> int:
        geometry = self._shell.pool.geometry
        return 0 if geometry is None else geometry.layout.block_bytes

    def loaded(self, num_loaded: int, num_failed: int, load_us: int, num_declined: int = 0) -> None:
        """An engine's report of a load, or of why there was none."""
        self.count("blocks_declined", num_declined)
        self.count("blocks_loaded", num_loaded)
        self.count("host_to_device", num_loaded)
        self.count("bytes_loaded", num_loaded * self._block_bytes())
        self.count("load_failures", num_failed)
        self.count("load_us", load_us)

    def stored(self, num_ready: int, store_us: int) -> None:
        """A worker's report of a store."""
        self.count("device_to_host", num_ready)
        self.count("bytes_stored", num_ready * self._block_bytes())
        self.count("store_us", store_us)

    def handed_over(self, outcome: str, num_missed: int, wait_us: int) -> None:
        """An engine's report of a handoff."""
        self.count(f"handoffs_{outcome}")
        self.count("handoff_blocks_missed", num_missed)
        self.count("handoff_wait_us", wait_us)

    def counters(self) -> dict[str, int]:
        """Every counter of the table."""
        node = self._shell.node
        core = {} if node is None else node.counters
        values = {name: self._own[name] + core.get(name, 0) for name in COUNTERS}
        if self.movement is not None and self.movement.pace is not None:
            values["promotion_saved_us"] += self.movement.pace.saved_us
        return values

    def gauges(self) -> dict[str, float]:
        """What stands now: slots by state, leases, sessions' time."""
        node, geometry = self._shell.node, self._shell.pool.geometry
        values = dict.fromkeys(GAUGES, 0.0)
        if node is not None and geometry is not None:
            values |= {f"slots_{s.value}": float(n) for s, n in node.ledger.num_by_state.items()}
            values["slots"] = float(geometry.num_slots)
            values["read_leases"] = float(len(node.reads))
            values["write_leases"] = float(len(node.writes))
        values["workers"] = float(self._shell.num_workers)
        values["sessions"] = float(self.num_sessions)
        values["uptime_s"] = self._clock.now_s() - self._begun_s
        return values

    def tenants(self) -> dict[str, dict[str, int]]:
        """What each tenant with a quota, and all others, hold of the pool and can count on."""
        node = self._shell.node
        if node is None:
            return {}
        accounts = node.ledger.accounts
        return {
            account.name: dict(zip(TENANT_GAUGES, (account.num_held, account.quota), strict=True))
            for account in (*accounts.tenants, accounts.others)
        }

    def status(self) -> dict[str, object]:
        """Everything a person or a script asks first."""
        pool = self._shell.pool
        layout = None if pool.geometry is None else pool.geometry.layout
        return {
            "version": kvkeep.__version__,
            "generation": pool.generation,
            "pool": {
                "path": str(pool.path),
                "bytes": pool.num_bytes,
                "block_bytes": self._block_bytes(),
                "layout": None
                if layout is None
                else {name: getattr(layout, name) for name in layout.__dataclass_fields__},
            },
            "movement": None if self.movement is None else self.movement.status(),
            "sequences": None if self.sequences is None else self.sequences.status(),
            "workers": self._shell.num_workers,
            "tenants": self.tenants(),
            "cartridges": self.residents.describe(),
            "gauges": self.gauges(),
            "counters": self.counters(),
        }

    def status_text(self) -> str:
        """``status`` as JSON."""
        return json.dumps(self.status())

    def collect(self) -> Iterator[Metric]:
        """Prometheus asks."""
        values = self.counters()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"kvkeep_{name}", text, value=values[name])
        for name, value in self.gauges().items():
            yield GaugeMetricFamily(f"kvkeep_{name}", GAUGES[name], value=value)
        if self.sequences is not None:
            yield from self.sequences.figures.collect()
        tenants = self.tenants()
        for name, text in TENANT_GAUGES.items():
            family = GaugeMetricFamily(f"kvkeep_{name}", text, labels=["tenant"])
            for tenant, found in tenants.items():
                family.add_metric([tenant], found[name])
            yield family
