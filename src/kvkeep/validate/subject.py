"""Opens a stack under test by its addresses and finds out what it can do."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.transfer.int8_form import Int8Form
from kvkeep.validate.arms.lower_tiers import LowerTiers, TierPlaces
from kvkeep.validate.capability import Capabilities, probe
from kvkeep.validate.load import Endpoint
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subjects import generic
from kvkeep.validate.subjects.base import UNKNOWN, Kind, Signs
from kvkeep.validate.subjects.hooks import Hooks, Outside, Reset
from kvkeep.validate.subjects.registry import find_kind, hooks_for, named_kind
from kvkeep.validate.subjects.signs import look

SMALL_ENGINE_BLOCKS_MAX = 128
"""An engine with no more blocks than this is small enough for the eviction case."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a stack under test listens."""

    engine: str
    daemon: str | None = None
    """A kvkeep daemon's metrics address, for tier counters."""
    other: str | None = None
    """A second engine on the same cache that never saw the prompts."""
    small: str | None = None
    """An engine with tiny memory for the eviction case."""
    model: str | None = None
    """Model to ask for; None takes what is served."""
    baseline: str | None = None
    """An engine of the same model without a cache outside it."""
    router: str | None = None
    """A router before the engines."""
    router_admin: str | None = None
    """The router's workers and explanations."""
    prefill: tuple[str, ...] = ()
    """Engines that only prefill, behind the router."""
    decode: tuple[str, ...] = ()
    """Engines that only decode, behind the router."""
    sequences: tuple[str, ...] = ()
    """Listeners for named sequences' K/V."""
    tiers: TierPlaces | None = None
    """Tiers that the check may empty, because the stack is its own."""
    signs: Signs | None = None
    """What a stack file says the engine is; None: it is asked."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The stack under test, probed."""

    engine: Endpoint
    capabilities: Capabilities
    daemon: Endpoint | None = None
    other: Endpoint | None = None
    small: Endpoint | None = None
    small_capabilities: Capabilities | None = None
    baseline: Endpoint | None = None
    front: Endpoint | None = None
    """The router that requests are sent through, where a suite is about one."""
    admin: Endpoint | None = None
    prefill: tuple[Endpoint, ...] = ()
    decode: tuple[Endpoint, ...] = ()
    sequence_urls: tuple[str, ...] = ()
    tiers: LowerTiers | None = None
    kind: Kind = generic.KIND
    signs: Signs = UNKNOWN

    @property
    def title(self) -> str:
        """What is judged, in a few words."""
        return self.engine.url if self.kind is generic.KIND else self.kind.title

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "url": self.engine.url,
            "daemon_url": self.daemon.url if self.daemon else None,
            "kind": self.kind.name,
            "title": self.title,
            "program": self.signs.program,
            "version": self.signs.version,
            "connectors": None if self.signs.connectors is None else list(self.signs.connectors),
            "hooks": self.engine.hooks.to_dict(),
            "capabilities": self.capabilities.to_dict(),
        }


@asynccontextmanager
async def open_subject(
    addresses: Addresses,
    *,
    timeout_s: float,
    exact: bool = False,
    settings: CheckSettings | None = None,
) -> AsyncIterator[Subject]:
    """Connect and probe; the connections are closed at the end.

    Args:
        addresses: Where to connect to.
        timeout_s: Longest wait for any one read of a response.
        exact: Equal bits will be demanded, so the engine's settings must allow them.
        settings: What a person said of the subject; None: nothing.

    Raises:
        InputError: Something named does not answer, serves another model, can't be exact, or the
            small engine is not small.
    """
    settings = settings or CheckSettings()
    async with AsyncExitStack() as stack:
        signs, kind = await _find_out(addresses, settings, timeout_s)
        door = _Door(stack, addresses.model, timeout_s, exact, settings, hooks_for(kind, settings))
        engine, capabilities = await door.open(addresses.engine, "engine")
        daemon = admin = small = small_capabilities = None
        sequences = addresses.sequences
        if addresses.daemon is not None:
            address = addresses.daemon.rstrip("/").removesuffix("/metrics").removesuffix("/status")
            daemon = Endpoint(address, name="daemon", timeout_s=timeout_s)
            await stack.enter_async_context(daemon)
            status = await _require_daemon(daemon, exact=exact)
            sequences = sequences or _sequence_urls(daemon, status)
        if addresses.small is not None:
            small, small_capabilities = await door.open(addresses.small, "small engine")
            _require_small(small, small_capabilities)
        if addresses.router_admin is not None:
            admin = Endpoint(addresses.router_admin, name="router admin", timeout_s=timeout_s)
            await stack.enter_async_context(admin)
        yield Subject(
            engine,
            capabilities,
            daemon,
            await door.open_if(addresses.other, "other engine"),
            small,
            small_capabilities,
            await door.open_if(addresses.baseline, "baseline"),
            await door.open_if(addresses.router, "router"),
            admin,
            await door.open_all(addresses.prefill, "prefill engine"),
            await door.open_all(addresses.decode, "decode engine"),
            sequences,
            LowerTiers(addresses.tiers, daemon) if addresses.tiers and daemon else None,
            kind,
            signs,
        )


@dataclass(frozen=True, slots=True)
class _Door:
    """Opens the endpoints of a subject, all in the same way."""

    stack: AsyncExitStack
    """Closes them."""
    model: str | None
    timeout_s: float
    exact: bool
    settings: CheckSettings
    hooks: Hooks

    async def open(self, url: str, name: str) -> tuple[Endpoint, Capabilities]:
        """Connect and probe."""
        endpoint = Endpoint(url, name=name, model=self.model, timeout_s=self.timeout_s)
        endpoint.hooks = _hooks_of(name, self.hooks)
        await self.stack.enter_async_context(endpoint)
        capabilities = await probe(endpoint, read_settings=self.exact)
        if capabilities.block_tokens is None:
            capabilities = replace(capabilities, block_tokens=self.settings.block_tokens)
        if self.exact and name in ("engine", "other engine"):
            _require_exact(endpoint, capabilities)
        return endpoint, capabilities

    async def open_if(self, url: str | None, name: str) -> Endpoint | None:
        """The same, where there is an address."""
        return None if url is None else (await self.open(url, name))[0]

    async def open_all(self, urls: Sequence[str], name: str) -> tuple[Endpoint, ...]:
        """The same, for each address."""
        return tuple([(await self.open(url, name))[0] for url in urls])


async def _find_out(
    addresses: Addresses, settings: CheckSettings, timeout_s: float
) -> tuple[Signs, Kind]:
    """What the engine is, as the stack file, its own words or a person has it."""
    named = None if settings.subject is None else named_kind(settings.subject)
    # A kind that was named saves the question that vLLM takes seconds to answer.
    told = addresses.signs or (None if named is None else Signs())
    async with Endpoint(addresses.engine, timeout_s=timeout_s) as endpoint:
        signs = await look(endpoint, told)
    return signs, named or find_kind(signs)


def _hooks_of(name: str, hooks: Hooks) -> Hooks:
    """The subject's own; of another engine only paths hold, a whole address is the first one's."""
    if name in ("engine", "router"):
        return hooks
    return Hooks(
        Reset() if "://" in hooks.reset.address else hooks.reset,
        Outside() if "://" in hooks.outside.address else hooks.outside,
    )


def _require_exact(endpoint: Endpoint, capabilities: Capabilities) -> None:
    if not capabilities.dialect.token_ids:
        raise InputError(
            f"The exact mode compares token ids and logprobs, and {endpoint.url} reports none."
        )
    if capabilities.can_be_exact is False:
        raise InputError(
            "The exact mode needs an engine with max_num_seqs=1 and max_num_batched_tokens equal "
            f"to its block size; {endpoint.url} has {capabilities.max_num_seqs}, "
            f"{capabilities.max_num_batched_tokens} and blocks of {capabilities.block_tokens}."
        )


def _require_small(endpoint: Endpoint, capabilities: Capabilities) -> None:
    if (capabilities.num_blocks or 0) > SMALL_ENGINE_BLOCKS_MAX:
        raise InputError(
            f"The eviction case needs an engine of at most {SMALL_ENGINE_BLOCKS_MAX} blocks; "
            f"{endpoint.url} has {capabilities.num_blocks}."
        )


def _sequence_urls(daemon: Endpoint, status: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the daemon itself keeps sequences; it listens beside its metrics."""
    port = (status.get("sequences") or {}).get("port")
    return (f"http://{httpx.URL(daemon.url).host}:{port}",) if port else ()


async def _require_daemon(daemon: Endpoint, *, exact: bool) -> Mapping[str, Any]:
    try:
        status = await daemon.get_json("/status")
    except UnavailableError as error:
        raise InputError(
            f"No kvkeep daemon answers at {daemon.url}: name its metrics address. ({error})"
        ) from error
    if not isinstance(status, dict) or not isinstance(status.get("counters"), dict):
        raise InputError(f"{daemon.url}/status has no counters: is it a kvkeep daemon?")
    if exact and Int8Form.name in _page_format(status):
        raise InputError(
            f"The exact mode needs blocks that are stored to the bit, and {daemon.url} has them in "
            "the form int8: leave kv_form out of the engine's settings, or check without --exact."
        )
    return status


def _page_format(status: Mapping[str, Any]) -> str:
    """Of the blocks in a daemon's pool; empty before its first engine."""
    layout = (status.get("pool") or {}).get("layout") or {}
    return str(layout.get("page_format", ""))
