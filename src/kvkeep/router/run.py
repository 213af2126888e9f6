"""A router from its settings to its end."""

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop
from aiohttp import web

from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import InputError
from kvkeep.router.admin import find_key, make_application
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.health.book import HealthBook
from kvkeep.router.health.prober import Prober
from kvkeep.router.limits.bucket import RetryBudget
from kvkeep.router.limits.gate import Gate
from kvkeep.router.limits.keys import KeyRing
from kvkeep.router.membership.etcd import check_etcd
from kvkeep.router.membership.roster import STATIC, Listener, Roster
from kvkeep.router.membership.sources import Sources
from kvkeep.router.metrics import RouterMetrics
from kvkeep.router.on_demand.desk import StartDesk
from kvkeep.router.on_demand.supervised import SupervisedStarter
from kvkeep.router.policies.base import Policy
from kvkeep.router.relay.relay import LOOK_S, Relay
from kvkeep.router.relay.server import ClientConnection
from kvkeep.router.router import Router
from kvkeep.router.settings import RouterSettings
from kvkeep.router.snapshot import Fleet

if TYPE_CHECKING:
    from kvkeep.router.cartridges.desk import CartridgeDesk
    from kvkeep.router.events.feeds import EventFeeds
    from kvkeep.router.handoff.desk import HandOffDesk
    from kvkeep.router.handoff.wiring import Fronts
    from kvkeep.router.tokenizing import Tokenizing

SPARE_FILES = 256
"""Descriptors beside a client's connection and one to an engine for each: probes, admin, logs."""

log = logging.getLogger(__name__)

BACKLOG = 1024
"""Connections that wait to be accepted: a whole fleet of clients may come back at once."""


def run(settings: RouterSettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once.

    Raises:
        InputError: A setting can't be had; nothing was left behind.
    """
    if not __debug__:
        raise InputError("kvkeep needs its assertions: start Python without -O")
    pumps_max = _allow_files(settings.relay.connections_max)
    admin_key = find_key(settings.admin_host, settings.admin_key_file)
    with (
        _bind(settings.host, settings.port) as sock,
        _bind(settings.admin_host, settings.admin_port) as admin,
    ):
        uvloop.run(_serve(settings, sock, admin, admin_key, pumps_max))


def _allow_files(connections_max: int) -> int:
    """Raise the limit on open files: a client whose connection can't be accepted just hangs.

    Returns:
        How many streams may be pumped, each of which takes one more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections_max + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise InputError(
            f"relay.connections_max = {connections_max} needs {wanted} open files and this user "
            f"may have {hard}: lower relay.connections_max, or raise the limit (ulimit -n)"
        )
    with_pumps = wanted + connections_max
    if hard != resource.RLIM_INFINITY:
        with_pumps = min(hard, with_pumps)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, with_pumps), hard))
    return with_pumps - wanted


def make_policy(settings: RouterSettings) -> Policy:
    """The policy that the settings name; imported only where it is used."""
    name = settings.policy
    if name == "round_robin":
        from kvkeep.router.policies.round_robin import RoundRobin

        return RoundRobin()
    if name == "least_loaded":
        from kvkeep.router.policies.least_loaded import LeastLoaded

        return LeastLoaded()
    if name == "power_of_two":
        from kvkeep.router.policies.power_of_two import PowerOfTwo

        # Two routers that draw alike would send their bursts to the same engines.
        return PowerOfTwo(Random(os.getpid()))
    if name == "consistent_hash":
        from kvkeep.router.policies.consistent_hash import ConsistentHash

        return ConsistentHash()
    if name == "session_affinity":
        from kvkeep.router.policies.session_affinity import SessionAffinity

        return SessionAffinity()
    if name == "prefix_aware":
        from kvkeep.router.policies.prefix_aware import PrefixAware
        from kvkeep.router.prefix_index import PrefixIndex
        from kvkeep.router.tokenizing import TEXT_BLOCK_TOKENS

        # By text unless told otherwise: that needs neither a tokenizer nor events of engines.
        block_tokens = settings.block_tokens if settings.tokenizer else TEXT_BLOCK_TOKENS
        index = PrefixIndex(block_tokens, settings.prefix_blocks_max)
        return PrefixAware(index, is_approximate=not settings.tokenizer)
    raise InputError(f"there is no policy {name!r}: see kvkeep route --help")


def make_decode_policy(settings: RouterSettings, policy: Policy) -> Policy:
    """The policy that chooses decode engines, beside the one that chooses prefill engines."""
    assert settings.handoff is not None
    from kvkeep.router.handoff.wiring import share_index

    name = settings.handoff.decode_policy
    shared = share_index(policy) if name == "prefix_aware" else None
    if shared is not None:
        return shared
    # An index of its own is of text: tokens and events are there for the other policy.
    plain = msgspec.structs.replace(settings, policy=name, tokenizer="", events=EngineEvents())
    return make_policy(plain)


def make_tokenizing(settings: RouterSettings) -> "Tokenizing | None":
    """What cuts prompts into the engines' blocks; None where that is not wanted.

    Raises:
        InputError: There is no tokenizer where the settings say.
    """
    if not settings.tokenizer or settings.policy != "prefix_aware":
        return None
    from kvkeep.router.tokenizing import Tokenizing, load_tokenizer

    tokenizer, renderer = load_tokenizer(Path(settings.tokenizer))
    return Tokenizing(tokenizer, settings.block_tokens, renderer)


def make_feeds(settings: RouterSettings, policy: Policy, clock: Clock) -> "EventFeeds | None":
    """What hears the engines' events; None where they can't be used."""
    if not settings.tokenizer or settings.policy != "prefix_aware":
        return None
    from kvkeep.router.events.feeds import EventFeeds
    from kvkeep.router.policies.prefix_aware import PrefixAware

    assert isinstance(policy, PrefixAware)
    return EventFeeds(settings.events, policy.index, clock)


def make_cartridges(settings: RouterSettings) -> "CartridgeDesk | None":
    """What finds the cartridges that requests name; None where that is not wanted.

    Raises:
        InputError: There can't be a registry where the settings say.
        UnavailableError, CorruptDataError: It can't be read.
    """
    if settings.cartridges is None:
        return None
    from kvkeep.router.cartridges.desk import CartridgeDesk

    return CartridgeDesk(settings.cartridges)


class Parts:
    """The parts of one router, wired together; nothing runs yet."""

    def __init__(self, settings: RouterSettings, clock: Clock) -> None:
        """Make them.

        Raises:
            InputError: A file that the settings name is wrong.
        """
        limits = settings.limits
        self.settings, self.clock = settings, clock
        self.fleet = Fleet()
        self.policy = make_policy(settings)
        self.tokenizing = make_tokenizing(settings)
        self.feeds = make_feeds(settings, self.policy, clock)
        self.book = HealthBook(self.fleet, settings.health)
        fronts = self._make_fronts(settings)
        listeners: list[Listener] = [self.policy] if fronts is None else [*fronts.listeners]
        if self.feeds is not None:
            listeners.append(self.feeds)
        self.roster = Roster(self.fleet, self.book, listeners, settings.engine_drain_s)
        keys = KeyRing.load(Path(limits.keys_file)) if limits.keys_file else None
        self.gate = Gate(limits, keys)
        retries = RetryBudget(limits.retry_share, limits.retry_min_per_s, limits.retry_burst)
        wanted = settings.on_demand
        declared = frozenset() if wanted is None else wanted.models
        if fronts is None:
            self.router = Router(self.fleet, self.policy, self.book, retries, declared)
        else:
            self.router = fronts.make_decode_router(retries)
        self.relay = Relay(
            self.router,
            self.gate,
            settings.relay,
            clock,
            asks_keys=keys is not None,
            tokenizing=self.tokenizing,
        )
        self.cartridges = self.relay.cartridges = make_cartridges(settings)
        self.router.holders = None if self.cartridges is None else self.cartridges.holders
        self.handoffs: HandOffDesk | None = None
        if fronts is not None and settings.handoff is not None:
            self.handoffs = fronts.make_desk(self.relay, settings.handoff, retries)
            self.relay.handoffs = self.handoffs
        self.starter: SupervisedStarter | None = None
        if wanted is not None:
            self.starter = SupervisedStarter(wanted.socket)
            self.relay.desk = StartDesk(wanted.engines, self.fleet, self.roster, self.starter)
        self.prober = Prober(self.book, settings.health, clock)
        self.roster.declare(STATIC, settings.engines, clock.now_s())
        self.sources = Sources(self.roster, clock, settings.engines_file, settings.etcd)

    def _make_fronts(self, settings: RouterSettings) -> "Fronts | None":
        if settings.handoff is None:
            return None
        from kvkeep.router.handoff.wiring import Fronts

        decode_policy = make_decode_policy(settings, self.policy)
        return Fronts(self.fleet, self.policy, decode_policy, self.book)

    def runs(self) -> list[Coroutine[Any, Any, None]]:
        """What has to run beside the relay, each until it is cancelled."""
        running = [self.prober.run(), *self.sources.runs()]
        if self.cartridges is not None:
            from kvkeep.router.cartridges.watching import CartridgeWatch

            running.append(CartridgeWatch(self.cartridges, self.fleet).run())
        desk, clock = self.relay.desk, self.clock
        if self.starter is not None and desk is not None:
            running.append(self.starter.run(lambda news: desk.told(news, clock.now_s())))
        return running

    async def close(self) -> None:
        """End what the parts run by themselves; afterwards no thread and no socket of theirs is."""
        if self.feeds is not None:
            await self.feeds.close()
        if self.tokenizing is not None:
            await asyncio.to_thread(self.tokenizing.close)
        if self.cartridges is not None:
            self.cartridges.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise InputError(
            f"port {port} on {host} can't be used ({error.strerror or error}): choose another, "
            "or 0 for a free one"
        ) from error
    return sock


async def _serve(
    settings: RouterSettings,
    sock: socket.socket,
    admin: socket.socket,
    admin_key: bytes | None,
    pumps_max: int,
) -> None:
    """Serve until told to stop."""
    if settings.etcd is not None:
        await check_etcd(settings.etcd)
    parts = Parts(settings, SystemClock())
    loop = asyncio.get_running_loop()
    told = asyncio.Queue[int]()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.put_nowait, number)
    relay = parts.relay
    relay.pumps_max = pumps_max
    running = [loop.create_task(each) for each in parts.runs()]
    for task in running:
        task.add_done_callback(_complain)
    pages = make_application(parts, RouterMetrics(parts), admin_key)
    runner = web.AppRunner(pages, access_log=None)
    await runner.setup()
    await web.SockSite(runner, admin).start()
    listener = await loop.create_server(lambda: ClientConnection(relay), sock=sock, backlog=BACKLOG)
    end_looks = begin_looks(loop, parts)
    # What exists by now stays: the collector need not walk it again and again.
    gc.collect()
    gc.freeze()
    try:
        _announce(settings, listener, admin)
        await told.get()
        relay.drain()
        await _drained(relay, told, settings.relay.drain_s)
    finally:
        end_looks()
        listener.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await runner.cleanup()
        await relay.close()
        await parts.close()


async def _drained(relay: Relay, told: "asyncio.Queue[int]", limit_s: float) -> None:
    """Wait until nothing runs, the limit is over, or somebody loses patience."""
    clock = relay.clock
    end_s = clock.now_s() + limit_s
    while not relay.is_quiet and clock.now_s() < end_s:
        try:
            await asyncio.wait_for(told.get(), LOOK_S / 5)
        except TimeoutError:
            continue
        return


def begin_looks(loop: asyncio.AbstractEventLoop, parts: Parts) -> Callable[[], None]:
    """Look at all time limits again and again; returns what ends that."""
    handle: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal handle
        handle = loop.call_later(LOOK_S, look)
        parts.relay.look()
        parts.roster.tick(parts.clock.now_s())

    def end() -> None:
        if handle is not None:
            handle.cancel()

    look()
    return end


def _complain(task: "asyncio.Task[None]") -> None:
    """What runs beside the relay runs until it is cancelled; the relay goes on without it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a part of the router ended: start it again", exc_info=error)


def _url_of(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(settings: RouterSettings, listener: asyncio.Server, admin: socket.socket) -> None:
    ready = {
        "event": "ready",
        "url": _url_of(listener.sockets[0].getsockname()),
        "admin_url": _url_of(admin.getsockname()),
        "policy": settings.policy,
        "pid": os.getpid(),
    }
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
