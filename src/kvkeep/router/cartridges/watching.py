"""Reads the registry and the engines' hosts again and again, beside the relay."""

import asyncio
import logging
from typing import Final

import aiohttp
import msgspec

from kvkeep.model.errors import CorruptDataError, UnavailableError
from kvkeep.router.cartridges.desk import CartridgeDesk
from kvkeep.router.snapshot import Endpoint, Fleet

PAGE_BYTES_MAX: Final = 4 << 20
PAGE_TIMEOUT_S: Final = 5.0
RESIDENT: Final = frozenset({"loaded", "in use", "pinned"})
"""States of a cartridge whose KV lies in memory."""

log = logging.getLogger(__name__)


class _Told(msgspec.Struct):
    cartridge_id: str
    state: str


class _Page(msgspec.Struct):
    cartridges: list[_Told]


_decoder = msgspec.json.Decoder(_Page)


def parse_page(body: bytes) -> frozenset[str] | None:
    """Ids of the cartridges that are resident; None if the page does not say.

    It is a JSON object with ``cartridges``, a list of objects with ``cartridge_id`` and ``state``,
    as a daemon's ``/status`` is.
    """
    try:
        page = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    return frozenset(each.cartridge_id for each in page.cartridges if each.state in RESIDENT)


def page_of(template: str, endpoint: Endpoint) -> str:
    """Where it is said what an endpoint's host has in memory."""
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    return template.replace("{host}", host).replace("{port}", str(endpoint.port))


class CartridgeWatch:
    """Keeps a desk up to date."""

    def __init__(self, desk: CartridgeDesk, fleet: Fleet) -> None:
        self._desk, self._fleet = desk, fleet
        self._is_well = True

    async def run(self) -> None:
        """Look until cancelled; then nothing of it is left open."""
        timeout = aiohttp.ClientTimeout(total=PAGE_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            while True:
                await asyncio.gather(self._read_registry(), self._ask_all(session))
                await asyncio.sleep(self._desk.settings.refresh_s)

    async def _read_registry(self) -> None:
        """What was read last counts until it can be read again."""
        try:
            self._desk.catalogue = await asyncio.to_thread(self._desk.read_registry)
        except (UnavailableError, CorruptDataError) as error:
            self._desk.num_errors += 1
            if self._is_well:
                log.warning("cartridges are known as they were: %s", error)
            self._is_well = False
        else:
            self._is_well = True

    async def _ask_all(self, session: aiohttp.ClientSession) -> None:
        template, holders = self._desk.settings.resident_at, self._desk.holders
        if not template:
            return
        pages: dict[str, list[str]] = {}
        for endpoint in self._fleet:
            pages.setdefault(page_of(template, endpoint), []).append(endpoint.name)
        holders.keep_only(frozenset(name for names in pages.values() for name in names))
        told = await asyncio.gather(*(_ask(session, page) for page in pages))
        for names, resident in zip(pages.values(), told, strict=True):
            for name in names:
                if self._fleet.find(name) is not None:
                    holders.tell(name, resident)


async def _ask(session: aiohttp.ClientSession, page: str) -> frozenset[str] | None:
    body = bytearray()
    try:
        async with session.get(page, allow_redirects=False) as answer:
            if answer.status != 200:
                return None
            async for part in answer.content.iter_chunked(1 << 16):
                body += part
                if len(body) > PAGE_BYTES_MAX:
                    return None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None
    return parse_page(bytes(body))
