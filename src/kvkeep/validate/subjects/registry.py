"""All kinds of subjects: found by their signs or by name."""

from collections.abc import Mapping
from dataclasses import replace

from kvkeep.model.errors import InputError
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subjects import (
    generic,
    kvkeep,
    lmcache,
    mooncake,
    nixl,
    offloading,
    trtllm,
    vllm,
)
from kvkeep.validate.subjects.base import Kind, Signs
from kvkeep.validate.subjects.hooks import Hooks, parse_outside, parse_reset

KINDS: Mapping[str, Kind] = {
    module.KIND.name: module.KIND
    for module in (kvkeep, lmcache, mooncake, nixl, offloading, trtllm, vllm, generic)
}
"""In the order in which they are tried; the last one is everything."""


def find_kind(signs: Signs) -> Kind:
    """What a subject with these signs is."""
    return next(kind for kind in KINDS.values() if kind.is_it(signs))


def named_kind(name: str) -> Kind:
    """The kind that a person named.

    Raises:
        InputError: There is none of this name.
    """
    if name not in KINDS:
        raise InputError(f"There is no subject {name!r}: take one of {', '.join(KINDS)}.")
    return KINDS[name]


def hooks_for(kind: Kind, settings: CheckSettings) -> Hooks:
    """The kind's own ways, or those that a person named.

    Raises:
        InputError: What was named is no request, or no address.
    """
    hooks = kind.hooks
    if settings.reset is not None:
        hooks = replace(hooks, reset=parse_reset(settings.reset))
    named = (
        settings.external_counters,
        settings.external_metrics,
        settings.external_counter_tokens,
    )
    if any(each is not None for each in named):
        hooks = replace(hooks, outside=parse_outside(*named))
    return hooks


def table() -> str:
    """The table of docs/subjects.md."""
    lines = [
        "| `--subject` | what is judged | beside the engine | proof that KV came from outside | "
        "example | here |",
        "|---|---|---|---|---|---|",
    ]
    for kind in KINDS.values():
        examples = ", ".join(f"[{name}](../examples/{name})" for name in kind.examples)
        cells = (f"`{kind.name}`", kind.title, kind.beside, kind.counted, examples, kind.trial)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
