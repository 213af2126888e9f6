"""Announces one engine in etcd for as long as this process says so, and the engine is well."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import aiohttp
import msgspec

from kvkeep.model.errors import InputError, RefusedError, UnavailableError
from kvkeep.router.membership.etcd import EtcdSettings
from kvkeep.router.membership.etcd_client import EtcdClient
from kvkeep.router.membership.member import Member

log = logging.getLogger(__name__)


async def _always() -> bool:
    return True


class Registration:
    """An entry under a lease: it goes when this ends, or when nobody renews it any more."""

    def __init__(
        self,
        settings: EtcdSettings,
        member: Member,
        ttl_s: int,
        is_well: Callable[[], Awaitable[bool]] = _always,
    ) -> None:
        """Announce nothing yet.

        Args:
            settings: Where.
            member: The engine; its name is the entry's.
            ttl_s: How long the entry outlives its process, or its engine's health.
            is_well: Asked before each renewal; answers within a third of ``ttl_s``.

        Raises:
            InputError: A file that the settings name can't be used.
        """
        self._settings, self._member, self._ttl_s = settings, member, ttl_s
        self._is_well, self._access = is_well, settings.load_access()
        self.announced = asyncio.Event()
        """Set once the entry is there."""

    @property
    def key(self) -> str:
        """Of the entry."""
        return self._settings.prefix + self._member.title

    async def run(self) -> None:
        """Announce and renew until cancelled; then the entry is taken back.

        Raises:
            InputError: etcd refuses, and never did otherwise.
        """
        num_failures = 0
        async with aiohttp.ClientSession(trust_env=False) as session:
            while True:
                url = self._settings.urls[num_failures % len(self._settings.urls)]
                client = EtcdClient(session, url, self._settings.timeout_s, self._access)
                try:
                    await self._hold(client)
                except (UnavailableError, RefusedError) as error:
                    if isinstance(error, RefusedError) and not self.announced.is_set():
                        raise InputError(str(error)) from error
                    num_failures += 1
                    log.warning("the engine is not announced. reason=%s", error)
                await asyncio.sleep(self._pause_s)

    @property
    def _pause_s(self) -> float:
        # Two renewals may be lost before the lease ends.
        return self._ttl_s / 3

    async def _hold(self, client: EtcdClient) -> None:
        """Announce under a new lease, until that is lost; nothing if the engine is not well."""
        if not await self._is_well():
            return
        lease_id = await client.grant(self._ttl_s)
        try:
            await client.put(self.key, msgspec.json.encode(self._member), lease_id)
            self.announced.set()
            is_held = True
            while is_held:
                await asyncio.sleep(self._pause_s)
                # Not renewed, the lease of an engine that died runs out.
                is_held = not await self._is_well() or await client.keep_alive(lease_id)
        except asyncio.CancelledError:
            with contextlib.suppress(UnavailableError, RefusedError):
                await client.revoke(lease_id)
            raise
        log.info("the engine's lease is over. key=%s", self.key)
