"""Asks the endpoints how they are: one task, and one more for each probe on its way.

Runs on the router's event loop beside the relay. A probe opens a connection of its own each time,
because whether the endpoint still takes one is part of the question.
"""

import asyncio
import contextlib
import json
from typing import Any

import aiohttp

from kvkeep.model.clock import Clock
from kvkeep.router.health.book import HealthBook, HealthSettings, Outcome
from kvkeep.router.snapshot import Endpoint

TICK_S = 0.05
"""How late a probe may begin."""
MODELS_BYTES_MAX = 1 << 20
"""Of the list of models."""
MODELS_MAX = 4096
NOT_FOUND = 404


class Prober:
    """The shell around `HealthBook`: what is due is asked over HTTP."""

    def __init__(self, book: HealthBook, settings: HealthSettings, clock: Clock) -> None:
        """Have nothing open yet."""
        self._book, self._settings, self._clock = book, settings, clock
        self._probes: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Probe until cancelled; then nothing of it is left open."""
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_s)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, trust_env=False, auto_decompress=False
        ) as session:
            try:
                while True:
                    for endpoint in self._book.due(self._clock.now_s()):
                        probe = asyncio.create_task(self._probe(session, endpoint))
                        self._probes.add(probe)
                        probe.add_done_callback(self._probes.discard)
                    await asyncio.sleep(TICK_S)
            finally:
                for probe in self._probes:
                    probe.cancel()
                await asyncio.gather(*self._probes, return_exceptions=True)

    async def _probe(self, session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
        models = None
        base = f"http://{_bracketed(endpoint.host)}:{endpoint.port}"
        try:
            async with session.get(base + self._settings.path, allow_redirects=False) as answer:
                # Servers that are no vLLM may have no page of that name; they answer all the same.
                is_well = answer.status in (200, NOT_FOUND)
            outcome = Outcome.FINISHED if is_well else Outcome.ERROR
            if is_well and self._settings.learn_models:
                models = await _find_models(session, base)
        except aiohttp.ClientConnectorError:
            outcome = Outcome.UNREACHABLE
        except TimeoutError:
            outcome = Outcome.TIMEOUT
        except (aiohttp.ClientError, OSError):
            outcome = Outcome.BROKEN
        self._book.probed(endpoint, outcome, self._clock.now_s(), models)


async def _find_models(session: aiohttp.ClientSession, base: str) -> frozenset[str] | None:
    """Names of the models that an endpoint serves; None if it does not say."""
    async with session.get(f"{base}/v1/models", allow_redirects=False) as answer:
        if answer.status != 200:
            return None
        body = await _read(answer)
    with contextlib.suppress(ValueError, RecursionError):
        return _model_names(json.loads(body))
    return None


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    parts = bytearray()
    async for part in answer.content.iter_chunked(1 << 16):
        parts += part
        if len(parts) > MODELS_BYTES_MAX:
            return b""
    return bytes(parts)


def _model_names(listed: Any) -> frozenset[str] | None:
    cards = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(cards, list) or len(cards) > MODELS_MAX:
        return None
    names = [card.get("id") for card in cards if isinstance(card, dict)]
    return frozenset(name for name in names if isinstance(name, str)) or None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
