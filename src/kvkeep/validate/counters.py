"""Counters of an engine and a daemon, and what their differences prove.

A served answer proves nothing by itself: a cache that is switched off answers too. So a run reads
the counters around each phase and works out which share of what could be served really came from
outside the engine.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from kvkeep.model.errors import UnavailableError
from kvkeep.validate.load import Endpoint

LOCAL_QUERIES = "vllm:prefix_cache_queries"
LOCAL_HITS = "vllm:prefix_cache_hits"
EXTERNAL_QUERIES = "vllm:external_prefix_cache_queries"
EXTERNAL_HITS = "vllm:external_prefix_cache_hits"
PREEMPTIONS = "vllm:num_preemptions"
ENGINE_COUNTERS = (LOCAL_QUERIES, LOCAL_HITS, EXTERNAL_QUERIES, EXTERNAL_HITS, PREEMPTIONS)
CACHE_CONFIG = "vllm:cache_config_info"


@dataclass(frozen=True, slots=True)
class Counters:
    """One reading of everything that counts, summed over labels."""

    engine: Mapping[str, float]
    """By vLLM's name without ``_total``; a counter the engine lacks is absent."""
    daemon: Mapping[str, int]
    """kvkeep's daemon's counters; empty where no daemon was named."""

    def since(self, before: "Counters") -> "Counters":
        """Differences; a counter that was absent before counts from zero."""
        return Counters(
            {name: value - before.engine.get(name, 0.0) for name, value in self.engine.items()},
            {name: value - before.daemon.get(name, 0) for name, value in self.daemon.items()},
        )

    @property
    def local_hit_tokens(self) -> int:
        """Prompt tokens the engine found in its own prefix cache."""
        return round(self.engine.get(LOCAL_HITS, 0.0))

    @property
    def external_hit_tokens(self) -> int:
        """Prompt tokens that came from outside the engine."""
        return round(self.engine.get(EXTERNAL_HITS, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"engine": dict(self.engine), "daemon": dict(self.daemon)}


def parse_engine(text: str) -> dict[str, float]:
    """Read `ENGINE_COUNTERS` from Prometheus text, summed over labels (engines, ranks).

    Raises:
        UnavailableError: The text is not in Prometheus's format.
    """
    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removesuffix("_total")
                if name in ENGINE_COUNTERS:
                    found[name] = found.get(name, 0.0) + sample.value
    except ValueError as error:
        raise UnavailableError(f"/metrics is not in Prometheus's format: {error}.") from error
    return found


def sum_counters(text: str, names: Collection[str]) -> float:
    """Sum counters of Prometheus text over their names and labels; one that is absent counts 0.

    Raises:
        UnavailableError: The text is not in Prometheus's format.
    """
    wanted = {name.removesuffix("_total") for name in names}
    try:
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.removesuffix("_total") in wanted
        )
    except ValueError as error:
        raise UnavailableError(f"The counters are not in Prometheus's format: {error}.") from error


def parse_cache_config(text: str) -> dict[str, str]:
    """Labels of ``vllm:cache_config_info``: block size, number of blocks; empty if absent."""
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == CACHE_CONFIG:
                    return dict(sample.labels)
    except ValueError:
        return {}
    return {}


async def read_engine(engine: Endpoint) -> dict[str, float]:
    """Read an engine's counters; what another program counts for it stands under vLLM's name.

    Raises:
        UnavailableError: That other program does not answer. An engine without ``/metrics``, or
            with something else there, has no counters and is not an error.
    """
    try:
        found = parse_engine(await engine.get_text("/metrics"))
    except UnavailableError:
        found = {}
    outside = engine.hooks.outside
    if outside.counters:
        text = await engine.get_text(outside.address)
        found[EXTERNAL_HITS] = sum_counters(text, outside.counters) * outside.tokens_each
    return found


async def read_counters(engine: Endpoint, daemon: Endpoint | None = None) -> Counters:
    """Read an engine's counters and, if named, a daemon's.

    Raises:
        UnavailableError: The daemon does not answer or answers something else, or what was named to
            count for the engine does not. An engine without ``/metrics`` has no counters and is not
            an error.
    """
    engine_counters = await read_engine(engine)
    if daemon is None:
        return Counters(engine_counters, {})
    status = await daemon.get_json("/status")
    counters = status.get("counters") if isinstance(status, dict) else None
    if not isinstance(counters, dict):
        raise UnavailableError(f"{daemon.url}/status has no counters: is it a kvkeep daemon?")
    numbers = {str(k): v for k, v in counters.items() if isinstance(v, int)}
    return Counters(engine_counters, numbers)


def find_backward(readings: Iterable[Counters]) -> list[str]:
    """Name the counters that fell between two successive readings; counters never may."""
    fallen: set[str] = set()
    before: Counters | None = None
    for reading in readings:
        if before is not None:
            for earlier, later in (
                (before.engine, reading.engine),
                (before.daemon, reading.daemon),
            ):
                fallen |= {name for name, value in earlier.items() if later.get(name, 0) < value}
        before = reading
    return sorted(fallen)


@dataclass(frozen=True, slots=True)
class Servable:
    """How much of a phase a cache could have served, in tokens of whole blocks."""

    external_tokens: int
    """First time a prefix is asked for in the phase: only the outside can serve it."""
    local_tokens: int
    """Asked again within the phase: the engine itself should serve it."""


def servable_tokens(prompts: Sequence[Sequence[int]], block_tokens: int) -> Servable:
    """Count what could be served in one phase that starts with an empty engine.

    At least the last token of a prompt is always computed, so whole blocks are counted before it:

        prompt:  [ block 0 ][ block 1 ][ block 2 ][ ta|i| l ]
        servable  <------------------------------>

    Args:
        prompts: Token ids of the phase's prompts in the order they were sent.
        block_tokens: Tokens per block of the engine.
    """
    # A tree of blocks: (number of the parent, tokens) -> number. Whole prefixes as keys would
    # cost the square of the prompt's length.
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    external = local = 0
    for token_ids in prompts:
        parent = 0
        for end in range(block_tokens, len(token_ids), block_tokens):
            node = (parent, tuple(token_ids[end - block_tokens : end]))
            if node in numbers:
                local += block_tokens
            else:
                numbers[node] = len(numbers) + 1
                external += block_tokens
            parent = numbers[node]
    return Servable(external, local)


def servable_of_one(num_tokens: int, block_tokens: int) -> int:
    """Tokens of whole blocks before the last token of one prompt."""
    return max(0, num_tokens - 1) // block_tokens * block_tokens
