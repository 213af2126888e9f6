"""Streams that go from socket to socket past Python, between real sockets and on both loops."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from kvkeep.router.relay import plain
from kvkeep.router.relay.server import ClientConnection
from kvkeep.router.relay.upstream import UpstreamConnection
from tests.unit.router.relay.wires import STREAM, Room, request, unchunked

LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [
    asyncio.new_event_loop,
    uvloop.new_event_loop,
]
EVENT = b"data: 12345\n\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
USAGE = (
    b'data: {"usage": {"prompt_tokens": 7, "completion_tokens": 5, '
    b'"prompt_tokens_details": {"cached_tokens": 3}}}\n\n'
)
USAGE_CHUNK = b"%x\r\n%b\r\n" % (len(USAGE), USAGE)
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

# libuv keeps one pipe for the signals of a process: it is there before leaks are looked for.
uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def _form() -> None:
    """Only the compiled part has pumps."""
    assert plain.Pump is not None


class Line:
    """A relay between a user's and an engine's end of two real connections."""

    def __init__(self, room: Room, user: socket.socket, engine: socket.socket) -> None:
        self.room, self.user, self.engine = room, user, engine
        self.connection: UpstreamConnection
        self.client: ClientConnection
        self.got = b""

    async def send(self, data: bytes) -> None:
        """The engine sends."""
        await asyncio.get_running_loop().sock_sendall(self.engine, data)

    async def await_bytes(self, num_bytes: int) -> bytes:
        """Read what the user gets until it is so many bytes, or the end."""
        loop = asyncio.get_running_loop()
        while len(self.got) < num_bytes:
            piece = await loop.sock_recv(self.user, 1 << 16)
            if not piece:
                break
            self.got += piece
        return self.got

    async def begin_stream(self, *, is_read: bool = True) -> int:
        """Ask, and have a stream begin; returns how many bytes the user got of it."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.user, request())
        if is_read:
            await loop.sock_recv(self.engine, 1 << 16)
        await self.send(STREAM)
        while b"\r\n\r\n" not in self.got:
            await self.await_bytes(len(self.got) + 1)
        for _ in range(6):
            await self.send(CHUNK)
            await self.await_bytes(len(self.got) + len(CHUNK))
        return len(self.got)


@contextlib.asynccontextmanager
async def opened() -> AsyncIterator[Line]:
    """A relay, its one client and its one engine, all connected."""
    loop = asyncio.get_running_loop()
    room = Room(idle=0)
    pool = room.relay.pool_of(room.endpoints[0])
    (user, ours), (engine, theirs) = socket.socketpair(), socket.socketpair()
    for each in (user, ours, engine, theirs):
        each.setblocking(False)
    line = Line(room, user, engine)
    _, line.connection = await loop.connect_accepted_socket(
        lambda: UpstreamConnection(pool), theirs
    )
    pool.give_back(line.connection, room.clock.at_s)
    _, line.client = await loop.connect_accepted_socket(lambda: ClientConnection(room.relay), ours)
    try:
        yield line
    finally:
        await room.relay.close()
        user.close()
        engine.close()


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> asyncio.Runner:
    """Runs a scenario on a loop."""
    return asyncio.Runner(loop_factory=request.param)


def test_a_stream_arrives_as_it_was_sent(runner: asyncio.Runner) -> None:
    """Whole, with its end; it is counted, and both connections serve on."""

    async def scenario() -> None:
        async with opened() as line:
            begun = await line.begin_stream()
            assert line.connection.is_pumped
            rest = [CHUNK] * 20 + [CHUNK * 3, USAGE_CHUNK, END]
            for number, piece in enumerate(rest):
                await line.send(piece)
                await line.await_bytes(begun + len(b"".join(rest[: number + 1])))
            head, _, body = line.got.partition(b"\r\n\r\n")
            traffic = line.room.endpoints[0].traffic

            assert body == CHUNK * 6 + b"".join(rest)
            assert b"X-Kvkeep-Route: " in head
            assert (traffic.prompt_tokens, traffic.cached_tokens) == (7, 3)
            assert traffic.response_bytes == len(STREAM) + len(body)
            assert not line.connection.is_pumped
            assert line.room.relay.num_pumps == 0
            line.got = b""
            assert await line.begin_stream()

    with runner:
        runner.run(scenario())


def test_a_chunk_in_parts_arrives(runner: asyncio.Runner) -> None:
    """What is not whole is read as ever, and the stream is pumped again behind it."""

    async def scenario() -> None:
        async with opened() as line:
            begun = await line.begin_stream()
            await line.send(CHUNK + CHUNK[:7])
            await line.await_bytes(begun + len(CHUNK))
            await line.send(CHUNK[7:])
            while line.got.count(EVENT) < 8:
                await line.await_bytes(len(line.got) + 1)
            for _ in range(6):
                before = len(line.got)
                await line.send(CHUNK)
                await line.await_bytes(before + len(CHUNK))

            assert line.got.count(EVENT) == 14
            assert line.connection.is_pumped

    with runner:
        runner.run(scenario())


@pytest.mark.parametrize("is_reset", [False, True])
def test_an_engine_that_breaks_off_is_told_of(runner: asyncio.Runner, is_reset: bool) -> None:
    """An error stands behind the last whole event, and then the connection ends."""

    async def scenario() -> None:
        async with opened() as line:
            # Who closes with bytes unread resets the connection.
            await line.begin_stream(is_read=not is_reset)
            assert line.connection.is_pumped
            line.engine.close()
            await line.await_bytes(1 << 20)

            assert b'data: {"error": {"message": "the engine broke off' in line.got
            assert line.got.endswith(b"\r\n0\r\n\r\n")
            assert line.room.num_in_flight == 0
            assert line.room.endpoints[0].traffic.num_failed == 1

    with runner:
        runner.run(scenario())


def test_a_client_that_leaves_ends_the_engines_work(runner: asyncio.Runner) -> None:
    """The engine sees the end of its connection: no descriptor keeps it open."""

    async def scenario() -> None:
        async with opened() as line:
            await line.begin_stream()
            line.user.close()
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.get_running_loop().sock_recv(line.engine, 1) == b""

            assert line.room.num_in_flight == 0
            assert line.room.relay.num_pumps == 0
            assert not line.connection.is_pumped

    with runner:
        runner.run(scenario())


def test_a_client_that_does_not_read_stops_the_engine(runner: asyncio.Runner) -> None:
    """The engine finds no room for more; when the client reads, all of it comes in order."""

    async def scenario() -> None:
        async with opened() as line:
            begun = await line.begin_stream()
            sent = [b"data: %05d%b\n\n" % (number, b"x" * 5000) for number in range(1000)]
            sending = asyncio.ensure_future(
                line.send(b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in sent))
            )
            # The loop turns until nothing moves: nothing happens by itself.
            for _ in range(100_000):
                await asyncio.sleep(0)
                if line.client.is_stalled:
                    break
            assert not sending.done()
            while sent[-1] not in line.got[-6000:]:
                await line.await_bytes(len(line.got) + 1)
            await sending

            assert unchunked(line.got[begun:] + b"0\r\n\r\n") == b"".join(sent)

    with runner:
        runner.run(scenario())


def test_an_engine_that_goes_silent_is_given_up(runner: asyncio.Runner) -> None:
    """Events that were pumped count as heard; without any the stream ends with an error."""

    async def scenario() -> None:
        async with opened() as line:
            await line.begin_stream()
            relay, clock = line.room.relay, line.room.clock
            silence_s = relay.settings.upstream_silence_s
            for _ in range(3):
                await line.send(CHUNK)
                await line.await_bytes(len(line.got) + len(CHUNK))
                clock.at_s += silence_s - 1
                relay.look()
            assert b"error" not in line.got
            for _ in range(2):
                clock.at_s += silence_s + 1
                relay.look()
            await line.await_bytes(1 << 20)

            assert b'"code": 504' in line.got

    with runner:
        runner.run(scenario())


def test_nothing_is_left_open_when_the_router_ends(runner: asyncio.Runner) -> None:
    """A pumped stream is told, and its second descriptor is closed."""

    async def scenario() -> None:
        async with opened() as line:
            await line.begin_stream()
            await line.room.relay.close()
            await line.await_bytes(1 << 20)

            assert b"the router stops" in line.got
            assert line.room.relay.num_pumps == 0
            assert not line.connection.is_pumped
            assert await asyncio.get_running_loop().sock_recv(line.engine, 1) == b""

    with runner:
        runner.run(scenario())


@pytest.mark.parametrize("is_known", [True, False])
def test_without_a_descriptor_a_stream_goes_on(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Where a pump's own could be missing for a client, or is not to be had, there is no pump."""

    def refuse(fd: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    async def scenario() -> None:
        async with opened() as line:
            if is_known:
                line.room.relay.pumps_max = 0
            else:
                monkeypatch.setattr("os.dup", refuse)
            begun = await line.begin_stream()
            assert not line.connection.is_pumped
            await line.send(CHUNK)
            await line.await_bytes(begun + len(CHUNK))
            await line.send(END)
            await line.await_bytes(begun + len(CHUNK + END))
            monkeypatch.undo()

            assert line.got.endswith(CHUNK + END)

    with runner:
        runner.run(scenario())
