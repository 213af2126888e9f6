"""Anything else: another connector of vLLM, or any server that speaks as OpenAI's does.

It is asked and counted as vLLM is, unless a person names other ways.
"""

from kvkeep.validate.subjects.base import Kind, Signs


def _is_it(signs: Signs) -> bool:
    return True


KIND = Kind(
    name="generic",
    title="any other connector or server",
    is_it=_is_it,
    beside="whatever stands under `servers`",
    counted="vLLM's counters, or those that `--external-counters` names",
    trial="as the settings say",
    when_idle=(
        "Where it counts by itself, name its counters with --external-counters and their address "
        "with --external-metrics."
    ),
    examples=("subjects/generic.yaml",),
)
