"""vLLM's own copies of KV in host memory; vLLM 0.32 has them on GPUs only."""

from kvkeep.validate.subjects.base import Kind, Signs

_NAMES = ("OffloadingConnector", "SimpleCPUOffloadConnector")


def _is_it(signs: Signs) -> bool:
    return signs.has(*_NAMES)


KIND = Kind(
    name="offloading",
    title="vLLM's own offloading",
    is_it=_is_it,
    beside="nothing: the memory is the engine's",
    counted="vLLM's counters, for any connector",
    trial="command line only: it refuses to start without a GPU",
    when_idle="Give it more memory (cpu_bytes_to_use): what does not fit is computed again.",
    examples=("subjects/offloading.yaml",),
)
