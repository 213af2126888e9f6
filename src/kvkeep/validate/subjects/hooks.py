"""How a subject is reset, and where it counts what it served from outside its engine.

vLLM's own ways are the default, and hold for whatever connector it was given. Others are named: by
the kind of subject, or by a person.
"""

from dataclasses import asdict, dataclass
from typing import Any

import httpx

from kvkeep.model.errors import InputError

METHODS = ("POST", "PUT", "GET", "DELETE")


@dataclass(frozen=True, slots=True)
class Reset:
    """The request that empties an engine's own cache, and leaves what lies outside it."""

    method: str = "POST"
    address: str = "/reset_prefix_cache"
    """A path of the engine, or a whole address."""
    otherwise: str = "start it with VLLM_SERVER_DEV_MODE=1"
    """What to do where the engine does not know the request."""

    @property
    def is_possible(self) -> bool:
        """Whether there is such a request at all."""
        return bool(self.address)


@dataclass(frozen=True, slots=True)
class Outside:
    """Counters of prompt tokens that came from outside the engine, if not vLLM's."""

    counters: tuple[str, ...] = ()
    """Names as Prometheus has them, with or without ``_total``; empty: vLLM's own."""
    address: str = "/metrics"
    """Where they are read: a path of the engine, or a whole address."""
    tokens_each: int = 1
    """Tokens that one of them stands for, where they count blocks."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Both, for one subject."""

    reset: Reset = Reset()
    outside: Outside = Outside()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def parse_reset(text: str) -> Reset:
    """Read ``POST /path``, ``POST http://host/path``, or an address alone, which is posted to.

    Raises:
        InputError: It is none of these.
    """
    words = text.split()
    if len(words) == 1:
        words = ["POST", *words]
    if len(words) != 2 or words[0].upper() not in METHODS or not _is_address(words[1]):
        raise InputError(
            f"--reset takes a request such as 'POST /reset_prefix_cache', not {text!r}; methods "
            f"are {', '.join(METHODS)}."
        )
    return Reset(words[0].upper(), words[1], "name another request with --reset")


def parse_outside(counters: str | None, address: str | None, tokens_each: int | None) -> Outside:
    """Read names that are separated by commas, and where they are found.

    Raises:
        InputError: There is an address or a size without names, or no such address.
    """
    names = tuple(part.strip() for part in (counters or "").split(",") if part.strip())
    if not names and (address or tokens_each):
        raise InputError(
            "--external-metrics and --external-counter-tokens say where and what "
            "--external-counters counts: name the counters too."
        )
    if address is not None and not _is_address(address):
        raise InputError(
            f"--external-metrics takes a path or an address such as http://127.0.0.1:9090/metrics, "
            f"not {address!r}."
        )
    return Outside(names, address or "/metrics", tokens_each or 1)


def _is_address(text: str) -> bool:
    if text.startswith("/"):
        return True
    try:
        parsed = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)
