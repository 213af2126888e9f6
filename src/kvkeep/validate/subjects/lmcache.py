"""vLLM with LMCache: in a server of its own (multi-process), or inside the engine.

Judged was the multi-process form of 0.5.6, whose connector comes with LMCache itself.
"""

from kvkeep.validate.subjects.base import Kind, Signs

_NAMES = ("LMCacheMPConnector", "LMCacheConnectorV1")


def _is_it(signs: Signs) -> bool:
    return signs.has(*_NAMES)


KIND = Kind(
    name="lmcache",
    title="vLLM + LMCache, multi-process",
    is_it=_is_it,
    beside="`lmcache server`, under `servers`",
    counted="vLLM's counters, for any connector",
    trial="judged, see below",
    when_idle=(
        "LMCache loads whole chunks, 256 tokens unless told otherwise: start its server with "
        "--chunk-size equal to the engine's block, or ask longer prompts (--word-count 1500)."
    ),
    examples=("subjects/lmcache.yaml",),
)
