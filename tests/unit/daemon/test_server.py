"""Sessions without sockets: a transport that only takes notes."""

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

import kvkeep.tiers.shared_memory as shared_memory
from kvkeep.daemon.metrics import Metrics
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.server import QUESTIONS_MAX, WRITE_BUFFER_BYTES_MAX, Server, SessionProtocol
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import SystemClock
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import decode_to_client, encode
from kvkeep.protocol.frames import FrameReader
from kvkeep.protocol.versions import VERSION
from kvkeep.tiers.shared_memory import PoolFile

NAMESPACE = b"n" * 32
HASHES = b"".join(bytes([number]) * 32 for number in range(4))
LAYOUT = m.Layout(2, 2, 512, 16, "bfloat16", "test")


class NotingTransport:
    """Everything an asyncio transport is to a session."""

    def __init__(self, pid: int, uid: int) -> None:
        self._credentials = struct.pack("3i", pid, uid, 0)
        self._frames = FrameReader()
        self.said: list[m.ToClient] = []
        self.is_closed = self.is_aborted = False
        self.num_unread_bytes = 0

    def get_extra_info(self, _name: str) -> "NotingTransport":
        """In place of the socket."""
        return self

    def getsockopt(self, *_: int) -> bytes:
        """Who the kernel says is there."""
        return self._credentials

    def get_write_buffer_size(self) -> int:
        """What the client has not read."""
        return self.num_unread_bytes

    def write(self, data: bytes) -> None:
        """Take note."""
        self.said += [decode_to_client(payload) for payload in self._frames.feed(data)]

    def is_closing(self) -> bool:
        """Whether it is over."""
        return self.is_closed or self.is_aborted

    def close(self) -> None:
        """Take note."""
        self.is_closed = True

    def abort(self) -> None:
        """Take note."""
        self.is_aborted = True


class Client:
    """The other end of a session."""

    def __init__(self, server: Server, pid: int | None = None, uid: int | None = None) -> None:
        self.transport = NotingTransport(
            os.getpid() if pid is None else pid, os.getuid() if uid is None else uid
        )
        self.session = SessionProtocol(server)
        self.session.connection_made(cast(Any, self.transport))

    def say(self, *messages: m.Message) -> list[m.ToClient]:
        """Send messages at once; returns the answers."""
        before = len(self.transport.said)
        self.session.data_received(b"".join(encode(message) for message in messages))
        return self.transport.said[before:]

    def greet(self, role: str = "worker", engine_id: str = "one") -> m.Welcome:
        """Open the session."""
        (answer,) = self.say(
            m.Hello(VERSION, role, engine_id, LAYOUT if role == "worker" else None)
        )
        assert isinstance(answer, m.Welcome)
        return answer

    def reserve(self) -> m.Reserved:
        """Ask for four slots."""
        (answer,) = self.say(m.Reserve(1, NAMESPACE, 0, HASHES, 0, 2, 30.0))
        assert isinstance(answer, m.Reserved)
        return answer

    def commit(self, reserved: m.Reserved) -> m.Committed:
        """Say that they are filled."""
        (answer,) = self.say(m.Commit(2, reserved.lease_id, b"\1" * 4))
        assert isinstance(answer, m.Committed)
        return answer


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with an empty pool."""
    clock = SystemClock()
    shell = Shell(PoolFile.open(tmp_path / "pool", 3 << 20), clock)
    settings, metrics = DaemonSettings(sessions_max=3), Metrics(shell, clock)
    movement = Movement(settings, shell, clock, metrics.count)
    yield Server(settings, shell, clock, metrics, movement)
    shell.close()


async def test_blocks_are_lent_after_they_were_committed(server: Server) -> None:
    """A whole life: reserved, committed, lent, given back and counted."""
    worker, reader = Client(server), Client(server)
    worker.greet()
    reader.greet("scheduler")
    assert worker.commit(worker.reserve()) == m.Committed(2, 4, is_fenced=False)

    (answer,) = reader.say(m.Acquire(1, NAMESPACE, 0, HASHES, 30.0))
    assert isinstance(answer, m.Acquired)
    assert len(answer.slots) == 16
    assert reader.say(m.Release([answer.lease_id], 3, 1, 50)) == []
    counters = server.metrics.counters()
    assert (counters["blocks_loaded"], counters["load_failures"]) == (3, 1)
    assert counters["bytes_loaded"] == 3 * 2048
    assert server.metrics.gauges()["read_leases"] == 0


async def test_reports_of_handoffs_are_counted(server: Server) -> None:
    """By outcome; what was missed and waited for adds up."""
    engine = Client(server)
    engine.greet("scheduler")
    assert engine.say(m.ReportHandoff("partial", 3, 500)) == []
    engine.say(m.ReportHandoff("partial", 2, 100))
    engine.say(m.ReportHandoff("whole", 0, 7))

    found = {k: v for k, v in server.metrics.counters().items() if k.startswith("handoff") and v}
    assert found == {
        "handoffs_partial": 2,
        "handoffs_whole": 1,
        "handoff_blocks_missed": 5,
        "handoff_wait_us": 607,
    }


async def test_a_session_that_ends_gives_everything_back(server: Server) -> None:
    """Its read leases end, and so does its count."""
    worker, reader = Client(server), Client(server)
    worker.greet()
    worker.commit(worker.reserve())
    reader.greet("scheduler")
    reader.say(m.Acquire(1, NAMESPACE, 0, HASHES, 30.0))
    assert server.metrics.gauges()["read_leases"] == 1
    reader.session.connection_lost(None)

    gauges = server.metrics.gauges()
    assert (gauges["read_leases"], gauges["sessions"], gauges["workers"]) == (0, 1, 1)


async def test_strangers_are_refused(server: Server) -> None:
    """Another user gets one sentence, and what he says is not read."""
    stranger = Client(server, uid=12345)
    assert stranger.say(m.Ping(1)) == []

    (answer,) = stranger.transport.said
    assert isinstance(answer, m.Refused)
    assert "run as that user" in answer.reason
    assert stranger.transport.is_closed


async def test_one_session_too_many_is_refused(server: Server) -> None:
    """The others stay."""
    clients = [Client(server) for _ in range(4)]

    assert [client.transport.is_closed for client in clients] == [False] * 3 + [True]


async def test_nothing_behind_a_refusal_is_carried_out(server: Server) -> None:
    """Messages in the same bytes are dropped with their session."""
    client = Client(server)
    client.greet("tool")
    answers = client.say(m.Ping(1), m.Hello(VERSION, "tool", "x"), m.Ping(2), m.Ping(3))

    assert [type(answer) for answer in answers] == [m.Pong, m.Refused]


async def test_a_deaf_client_is_cut_once(server: Server) -> None:
    """Not once for every message that it sent before."""
    client = Client(server)
    client.greet("tool")
    client.transport.num_unread_bytes = WRITE_BUFFER_BYTES_MAX + 1
    client.say(*(m.Ping(number) for number in range(100)))

    assert client.transport.is_aborted
    assert server.metrics.counters()["sessions_cut"] == 1


async def test_a_reserve_before_any_layout_is_refused(server: Server) -> None:
    """A tool can't write; heads beyond the model's can't be written."""
    tool = Client(server)
    tool.greet("tool")
    (refused,) = tool.say(m.Reserve(1, NAMESPACE, 0, HASHES, 0, 2, 30.0))
    assert isinstance(refused, m.Refused)
    worker = Client(server)
    worker.greet()
    for first, number in ((0, 3), (2, 1), (0, 0)):
        client = Client(server)
        client.greet("tool")
        (refused,) = client.say(m.Reserve(1, NAMESPACE, 0, HASHES, first, number, 30.0))
        assert isinstance(refused, m.Refused)
        client.session.connection_lost(None)


async def test_blocks_too_small_for_the_pool_are_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot for each would keep the daemon busy for seconds; the next engine is served."""
    monkeypatch.setattr(shared_memory, "SLOTS_MAX", 1000)
    tiny = Client(server)
    greeting = m.Hello(VERSION, "worker", "one", m.Layout(1, 1, 1, 16, "int8", "test"))
    (answer,) = tiny.say(greeting)
    tiny.session.connection_lost(None)

    assert isinstance(answer, m.Refused)
    assert "lower pool_bytes to" in answer.reason
    assert Client(server).greet().num_slots > 0


async def test_a_greeting_ends_its_own_engines_earlier_writes(server: Server) -> None:
    """The same engine of the same process says that its copies are over."""
    before, after = Client(server), Client(server)
    before.greet()
    reserved = before.reserve()
    after.greet()

    assert before.commit(reserved).is_fenced


async def test_a_greeting_speaks_for_no_other_engine(server: Server) -> None:
    """Two engines in one process, and processes that the kernel can't tell apart."""
    one, two = Client(server), Client(server)
    one.greet(engine_id="one")
    reserved = one.reserve()
    two.greet(engine_id="two")
    assert one.commit(reserved).num_ready == 4


async def test_one_of_two_engines_in_a_process_comes_and_goes_without_a_trace(
    server: Server,
) -> None:
    """What it left is proven quiet by its own next greeting, and what the other writes stays."""
    other = Client(server)
    other.greet(engine_id="other")
    reserved = other.reserve()
    for _ in range(5):
        one = Client(server)
        one.greet(engine_id="one")
        one.session.connection_lost(None)

    assert server.metrics.gauges()["slots_fenced"] == 1
    assert other.commit(reserved).num_ready == 4


async def test_a_greeting_of_an_unknown_process_proves_nothing(server: Server) -> None:
    """Engines in namespaces of their own all look like process 0."""
    one, two = Client(server, pid=0), Client(server, pid=0)
    one.greet()
    reserved = one.reserve()
    one.session.connection_lost(None)
    two.greet()

    assert server.metrics.gauges()["slots_fenced"] >= len(reserved.slots) // 4


async def test_a_cleared_pool_lends_nothing(server: Server) -> None:
    """And says how many blocks went."""
    worker = Client(server)
    worker.greet()
    worker.commit(worker.reserve())
    (cleared,) = worker.say(m.Clear(5))
    (answer,) = worker.say(m.Acquire(6, NAMESPACE, 0, HASHES, 30.0))

    assert isinstance(cleared, m.Cleared)
    assert cleared.num_cleared == 4
    assert isinstance(answer, m.Acquired)
    assert answer.lease_id == 0


async def test_a_clear_leaves_a_workers_canary_alone(server: Server) -> None:
    """Its slot is neither kept from the pool for good nor counted; the session's end frees it."""
    worker = Client(server)
    worker.greet()
    before = server.metrics.gauges()["slots_writing"]
    (cleared,) = worker.say(m.Clear(5))

    assert isinstance(cleared, m.Cleared)
    assert (cleared.num_cleared, cleared.num_kept) == (0, 0)
    gauges = server.metrics.gauges()
    assert (gauges["slots_writing"], gauges["slots_fenced"]) == (before, 0) == (1, 0)


async def test_a_prefetch_is_answered_with_what_is_looked_for(server: Server) -> None:
    """Nothing where no tier is; it is no lookup, and needs a greeting as any question does."""
    reader, stranger = Client(server), Client(server)
    reader.greet("scheduler")
    asked = m.Prefetch(3, NAMESPACE, 0, HASHES, 1000)
    assert reader.say(asked) == [m.Prefetching(3, 0)]
    counters = server.metrics.counters()
    assert (counters["prefetches_asked"], counters["lookups"]) == (1, 0)

    (refused,) = stranger.say(asked)
    assert isinstance(refused, m.Refused)


async def test_the_canaries_namespace_is_nobodys(server: Server) -> None:
    """Who stores under it would be owed room that tenants count on."""
    worker = Client(server)
    worker.greet()
    (answer,) = worker.say(m.Reserve(1, bytes(32), 0, HASHES, 0, 2, 30.0))

    assert isinstance(answer, m.Refused)
    assert worker.transport.is_closed


async def test_questions_about_tiers_have_a_limit(server: Server) -> None:
    """Each takes memory and time; beyond a few, one is told to come again, and then may."""
    client = Client(server)
    client.greet("tool")
    asked = [m.VerifyTier(number, "pool") for number in range(QUESTIONS_MAX)]
    at_once = client.say(*asked, m.VerifyTier(99, "pool"))

    assert [(type(each), each.request_id) for each in at_once] == [(m.Told, 99)]  # type: ignore[union-attr]
    assert "try again later" in at_once[0].text  # type: ignore[union-attr]
    await asyncio.gather(*client.session._waits)
    await asyncio.sleep(0)
    assert server.num_questions == 0
    assert client.say(m.VerifyTier(100, "pool")) == []
    await asyncio.gather(*client.session._waits)


async def test_cartridges_are_told_of_and_dropped(server: Server) -> None:
    """An engine names its blocks; a tool drops them, once."""
    engine, tool = Client(server), Client(server)
    engine.greet()
    tool.greet("tool")
    told = m.KeepCartridge("ships", "d" * 64, NAMESPACE, 0, HASHES, is_pinned=True)

    assert engine.say(told) == []
    (resident,) = server.metrics.residents.describe()
    assert (resident["cartridge_id"], resident["state"]) == ("ships", "absent")
    assert tool.say(m.DropCartridge(1, "ships", False)) == [m.Told(1, True, '{"dropped": 0}')]
    (answer,) = tool.say(m.DropCartridge(2, "ships", False))
    assert isinstance(answer, m.Told)
    assert "no engine has brought" in answer.text
