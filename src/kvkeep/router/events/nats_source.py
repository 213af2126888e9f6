"""The block events of one engine over NATS JetStream, as ``kvkeep forward`` publishes them there.

What is new comes by an ordinary subscription, in order and without a consumer that the server would
have to keep; what was missed is read from the stream, message by message. A message's headers say
its number, the run of the forwarder that counts, and where in the stream the one before it lies.

Threading and blocking: one task on the event loop. Bounded: messages and bytes that wait (what is
beyond is dropped, which shows as a gap); the stream's own limits are the server's business.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvkeep.model.clock import Clock
from kvkeep.model.errors import InputError
from kvkeep.router.events.block_events import BATCH_BYTES_MAX
from kvkeep.router.events.following import Follower, TakesEvents, Told

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

SUBJECTS: Final = "kvkeep.events"
"""In front of each engine's name."""
NUMBER, RUN, BEFORE = "Kvkeep-Number", "Kvkeep-Run", "Kvkeep-Before"
WAITING_MAX = 10_000
PING_S = 5
"""A server that does not answer for so long, twice, has lost its connection."""
RETRY_S = 1.0
LOOK_S = 0.5
CALL_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class NatsAddress:
    """Where an engine's events are kept."""

    url: str
    subject: str


async def connect(url: str, **callbacks: Any) -> "Client":
    """Connect, however long that takes; after that the client connects again by itself.

    Raises:
        InputError: The package is missing.
    """
    try:
        import nats
    except ImportError as error:
        raise InputError("events over NATS need nats-py: install kvkeep[nats]") from error
    return await nats.connect(
        url,
        connect_timeout=CALL_TIMEOUT_S,
        reconnect_time_wait=RETRY_S / 4,
        max_reconnect_attempts=-1,
        ping_interval=PING_S,
        allow_reconnect=True,
        error_cb=_ignored,
        **callbacks,
    )


async def close(client: "Client") -> None:
    """End a connection, in whatever state it is."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await client.close()


async def _ignored(_error: Exception) -> None:
    """The client says each failed attempt; that it is away is counted where it matters."""


class NatsSource(Follower):
    """Feeds a table with the events of one engine until its task is cancelled."""

    def __init__(
        self, endpoint: str, address: NatsAddress, table: TakesEvents, clock: Clock | None = None
    ) -> None:
        """Prepare; nothing is opened.

        Args:
            endpoint: The engine's name in the table.
            address: Where its events are kept.
            table: What to feed.
            clock: Tells how long the server was out of reach.
        """
        super().__init__(endpoint, table, clock)
        self._address = address
        self._client: Client | None = None
        self._seen_seq = 0
        """Up to here the stream's messages have been taken, or are not ours."""
        self._news: asyncio.Queue[bool | Msg] = asyncio.Queue()
        """Messages, and whether the connection is there, in order."""

    async def run(self) -> None:
        """Listen until cancelled; afterwards no connection is open."""

        async def is_lost() -> None:
            self._news.put_nowait(False)

        async def is_found() -> None:
            self._news.put_nowait(True)

        async def is_told(message: "Msg") -> None:
            if self._news.qsize() < WAITING_MAX:
                self._news.put_nowait(message)

        self._client = await connect(
            self._address.url, disconnected_cb=is_lost, reconnected_cb=is_found
        )
        try:
            await self._client.subscribe(
                self._address.subject,
                cb=is_told,
                pending_msgs_limit=WAITING_MAX,
                pending_bytes_limit=BATCH_BYTES_MAX,
            )
            await self._client.flush()
            await self.found()
            task = asyncio.current_task()
            # A call of nats-py that is answered in that moment swallows a cancellation
            # (asyncio.wait_for before Python 3.12, cpython issue 86296).
            while task is None or not task.cancelling():
                await self._listen_once()
                self.look()
        finally:
            await close(self._client)

    async def _listen_once(self) -> None:
        try:
            async with asyncio.timeout(LOOK_S):
                news = await self._news.get()
        except TimeoutError:
            return
        if news is True:
            await self.found()
        elif news is False:
            self.lost()
        else:
            await self._take_message(news)

    async def _take_message(self, message: "Msg") -> None:
        headers = message.headers or {}
        told = _told(headers, message.data)
        if told is None:
            self.counters.num_refused += 1
            return
        if told.number == self._next and told.run == self._run:
            # What lies before it in the stream need not be read again.
            self._seen_seq = max(self._seen_seq, _as_number(headers.get(BEFORE)) or 0)
        await self.heard(told)

    async def ask(self, first: int) -> AsyncGenerator[Told, None]:
        """Read what the stream has of this engine, from where it was read last."""
        from nats.js.errors import Error, NotFoundError

        assert self._client is not None
        stream = self._client.jetstream(timeout=CALL_TIMEOUT_S)
        seq = 0 if not first else max(0, self._seen_seq - 1)
        try:
            name = await stream.find_stream_name_by_subject(self._address.subject)
            while True:
                found = await stream.get_msg(
                    name, seq=seq + 1, subject=self._address.subject, next=True
                )
                assert found.seq is not None
                self._seen_seq = seq = found.seq
                told = _told(found.headers or {}, found.data or b"")
                if told is None:
                    self.counters.num_refused += 1
                elif told.run != self._run or told.number >= first:
                    yield told
        except NotFoundError:
            return
        except (Error, TimeoutError):
            # JetStream is not there; what is new still comes.
            return


def _told(headers: dict[str, str], payload: bytes) -> Told | None:
    number = _as_number(headers.get(NUMBER))
    if number is None or len(payload) > BATCH_BYTES_MAX:
        return None
    return Told(number, payload, headers.get(RUN, ""))


def _as_number(text: str | None) -> int | None:
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 18:
        return None
    return int(text)
