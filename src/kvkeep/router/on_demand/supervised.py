"""A `Starter` whose engines are a stack's: orders and news, a line of JSON each, over a socket.

The supervisor says of every engine how it is when the router connects, and then each change. So a
router that was restarted learns what runs, and an order that was lost on the way is seen to be.
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from kvkeep.router.on_demand.starter import EngineOrder, StartNews

AGAIN_S = 0.5
"""Until the supervisor is asked again that was not there."""
LINE_BYTES_MAX = 1 << 16

log = logging.getLogger(__name__)
_news = msgspec.json.Decoder(StartNews)


class SupervisedStarter:
    """Asks a supervisor over its socket."""

    def __init__(self, path: str) -> None:
        """Be connected to nobody; ``run`` connects."""
        self._path = path
        self._writer: asyncio.StreamWriter | None = None

    def start(self, name: str) -> None:
        """Have an engine started."""
        self._order(name, is_wanted=True)

    def stop(self, name: str) -> None:
        """Have an engine stopped."""
        self._order(name, is_wanted=False)

    def _order(self, name: str, *, is_wanted: bool) -> None:
        # Without a connection the order is given again when the news that come with one show need.
        if self._writer is not None:
            self._writer.write(msgspec.json.encode(EngineOrder(name, is_wanted)) + b"\n")

    async def run(self, told: Callable[[StartNews], None]) -> None:
        """Tell of every engine and each change, connecting again and again until cancelled."""
        is_known_away = False
        while True:
            try:
                await self._listen(told)
                why = "the supervisor closed the connection"
            except (OSError, ValueError) as error:
                why = str(error)
            if not is_known_away:
                log.warning("no engine can be started on demand now. reason=%s", why)
            is_known_away = True
            await asyncio.sleep(AGAIN_S)

    async def _listen(self, told: Callable[[StartNews], None]) -> None:
        """Until the connection is over.

        Raises:
            OSError: There is none.
            ValueError: Something else than news came.
        """
        reader, writer = await asyncio.open_unix_connection(self._path, limit=LINE_BYTES_MAX)
        self._writer = writer
        try:
            while line := await reader.readline():
                told(_news.decode(line))
        finally:
            self._writer = None
            writer.close()
