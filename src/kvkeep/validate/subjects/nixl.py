"""A prefill and a decode engine of stock vLLM that hand over through NIXL, behind a router."""

from kvkeep.validate.subjects.base import Kind, Signs

_NAMES = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")


def _is_it(signs: Signs) -> bool:
    return signs.has(*_NAMES)


KIND = Kind(
    name="nixl",
    title="vLLM + NixlConnector, a pair",
    is_it=_is_it,
    beside="a router, which the stack starts, or any other with `--router-url`",
    counted="vLLM's counters of the decode engine",
    trial="not judged yet",
    when_idle=(
        "NixlConnector keeps nothing: only prompts that come through the router are handed over, "
        "so ask for determinism-disaggregated or pd-accuracy."
    ),
    examples=("subjects/nixl.yaml",),
)
