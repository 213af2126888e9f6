"""vLLM with its own connectors to Mooncake, of which the store is a cache."""

from kvkeep.validate.subjects.base import Kind, Signs


def _is_it(signs: Signs) -> bool:
    return signs.has("MooncakeStoreConnector")


KIND = Kind(
    name="mooncake",
    title="vLLM + MooncakeStoreConnector",
    is_it=_is_it,
    beside="`mooncake_master`, under `servers`; the memory is the engine's worker's",
    counted="vLLM's counters, for any connector",
    trial="judged, see below",
    when_idle=(
        "Look for rejected transfers in the engine's log: with Mooncake's own limits TCP refuses "
        "loads of many blocks (MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER)."
    ),
    examples=("subjects/mooncake.yaml",),
)
