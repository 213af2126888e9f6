"""What running engines tell of their blocks, and whether prefill and decode engines fit each other.

vLLM tells how its cache is cut as labels of a metric. Engines that tell nothing, or do not answer,
are not judged: a router may be started before its engines are.
"""

import itertools
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from kvkeep.model.errors import InputError
from kvkeep.router.handoff.settings import HandOffSettings
from kvkeep.router.settings import RouterSettings, load_settings
from kvkeep.router.snapshot import Role
from kvkeep.stack.readiness import make_client

CACHE_METRIC = "vllm:cache_config_info"
"""Its labels are the fields of the engine's CacheConfig (vllm 0.26 to 0.33)."""
_ARGUMENTS = {"block_size": "--block-size", "cache_dtype": "--kv-cache-dtype"}
"""By label: what both engines of a pair need alike, and the argument that sets it."""
ASKED_AT_ONCE_MAX = 16
VALUE_CHARS_MAX = 40


class Told(msgspec.Struct, frozen=True):
    """What one engine tells of itself."""

    name: str
    url: str
    models: frozenset[str] = frozenset()
    cache: Mapping[str, str] = {}
    """Labels of ``CACHE_METRIC``."""


def check_running(settings: RouterSettings) -> None:
    """Refuse a fleet whose engines can't read each other's blocks, as far as they tell now.

    Args:
        settings: Of the router; the engines that are named there are asked.

    Raises:
        InputError: One sentence that names two engines and the mend.
    """
    with_role = [member for member in settings.engines if member.role is not Role.SERVE]
    if not with_role:
        return
    with ThreadPoolExecutor(ASKED_AT_ONCE_MAX) as threads:
        told = threads.map(lambda member: ask_engine(member.name, member.url), with_role)
    handoff = settings.handoff or HandOffSettings()
    check_told(told, transport=handoff.transport)


def check_values(values: Mapping[str, object]) -> None:
    """The same for a router's settings as its file would say them."""
    check_running(load_settings(None, {}, values))


def check_told(told: Iterable[Told], *, transport: str) -> None:
    """Refuse two engines of one model that can't read each other's blocks.

    Args:
        told: By all engines of the roles prefill and decode.
        transport: ``nixl`` may know how to read blocks of another size, ``pool`` does not.

    Raises:
        InputError: One sentence that names both and the mend.
    """
    labels = [each for each in _ARGUMENTS if transport == "pool" or each != "block_size"]
    for one, other in itertools.combinations(told, 2):
        for label in labels if one.models & other.models else ():
            first, second = (each.cache.get(label) for each in (one, other))
            if None not in (first, second) and first != second:
                raise InputError(
                    f"{_shown(other)} runs with {_ARGUMENTS[label]} {_cut(second)} and "
                    f"{_shown(one)} with {_cut(first)}: neither can read blocks that the other "
                    "computed; start both with the same, or leave one out."
                )


def _shown(each: Told) -> str:
    return f"engine {each.name} at {each.url}" if each.name else f"the engine at {each.url}"


def _cut(value: str | None) -> str:
    return (value or "")[:VALUE_CHARS_MAX]


def ask_engine(name: str, url: str) -> Told:
    """What an engine tells; only its name where it does not answer.

    Args:
        name: The fleet's for it.
        url: Address without a path.
    """
    base = url.rstrip("/")
    with make_client(url) as client:
        try:
            metrics = client.get(f"{base}/metrics").text
            listed = client.get(f"{base}/v1/models").json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return Told(name, url)
    return Told(name, url, _model_names(listed), find_cache_labels(metrics))


def _model_names(listed: Any) -> frozenset[str]:
    cards = listed.get("data") if isinstance(listed, dict) else None
    names = [card.get("id") for card in cards or () if isinstance(card, dict)]
    return frozenset(name for name in names if isinstance(name, str))


def find_cache_labels(metrics: str) -> Mapping[str, str]:
    """How an engine's cache is cut, by the names of vLLM's own settings; empty if it does not say.

    Args:
        metrics: What ``/metrics`` answered.
    """
    lines = [line for line in metrics.splitlines() if line.startswith(CACHE_METRIC + "{")]
    try:
        families = list(text_string_to_metric_families("\n".join(lines[:1]) + "\n"))
        return dict(families[0].samples[0].labels)
    except (ValueError, KeyError, IndexError):
        return {}
