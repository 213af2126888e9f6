"""Both ends of the control socket, and what crosses between the connector's halves."""

import asyncio
import contextlib
import socket
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.client.connection import Connection
from kvkeep.connector.metadata import LoadResult, StepReport
from kvkeep.daemon.metrics import Metrics
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.server import Server
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, RefusedError, UnavailableError
from kvkeep.model.ids import CANARY_NAMESPACE
from kvkeep.protocol import codec
from kvkeep.protocol import messages as m
from kvkeep.protocol.frames import FRAME_BYTES_MAX, frame
from kvkeep.protocol.versions import VERSION
from kvkeep.tiers.mooncake.requests import answer_decoder
from kvkeep.tiers.shared_memory import PoolFile
from tests.property.fuzz.damage import NUMBERS, costing_at_most, damaged, examples
from tests.unit.daemon.test_server import HASHES, LAYOUT, NAMESPACE, Client

WIRE_LAYOUT = LAYOUT
NAMESPACES = st.sampled_from([NAMESPACE, bytes(CANARY_NAMESPACE), b"x" * 32, b"short"])
HASH_TEXTS = st.sampled_from([HASHES, HASHES * 100, b"", HASHES[:33], HASHES[:32]])
IDS = st.integers(0, 9) | NUMBERS
SECONDS = st.sampled_from([0.0, 1e-9, 30.0, 60.0, 61.0, 86_400.0, float("nan"), -1.0])
MESSAGES = st.one_of(
    st.builds(m.Hello, st.just(VERSION) | IDS, st.sampled_from(["worker", "scheduler", "x"]),
              st.text(max_size=9), st.none() | st.just(WIRE_LAYOUT)),
    st.builds(m.Acquire, IDS, NAMESPACES, IDS, HASH_TEXTS, SECONDS, IDS),
    st.builds(m.Prefetch, IDS, NAMESPACES, IDS, HASH_TEXTS, IDS),
    st.builds(m.Release, st.lists(IDS, max_size=5), IDS, IDS, IDS),
    st.builds(m.Reserve, IDS, NAMESPACES, IDS, HASH_TEXTS, IDS, IDS, SECONDS),
    st.builds(m.Commit, IDS, IDS, st.binary(max_size=9), IDS),
    st.builds(m.ReportCorrupt, NAMESPACES, IDS, HASH_TEXTS),
    st.builds(
        m.ReportHandoff, st.sampled_from(get_args(m.HandoffOutcome)) | st.just("x"), IDS, IDS
    ),
    st.builds(m.KeepCartridge, st.sampled_from(["a", "b", ""]), st.just("d"), NAMESPACES, IDS,
              HASH_TEXTS, st.booleans()),
    st.builds(m.DropCartridge, IDS, st.sampled_from(["a", "b", ""]), st.booleans()),
    st.builds(m.Ping, IDS), st.builds(m.GetStatus, IDS), st.builds(m.Clear, IDS),
)  # fmt: skip
HELLO = m.Hello(VERSION, "worker", "one", WIRE_LAYOUT)
encode_loosely = msgspec.msgpack.Encoder().encode


def stream_of(messages: list[m.Message]) -> bytes:
    """Frames of messages, whatever their fields hold."""
    return b"".join(frame(encode_loosely(message)) for message in messages)


async def serve(streams: list[bytes], cuts: list[int]) -> None:
    """Several sessions, one after the other; the last is a good one and is served."""
    with TemporaryDirectory() as folder:
        clock = SystemClock()
        shell = Shell(PoolFile.open(Path(folder) / "pool", 3 << 20), clock)
        settings, metrics = DaemonSettings(), Metrics(shell, clock)
        movement = Movement(settings, shell, clock, metrics.count)
        server = Server(settings, shell, clock, metrics, movement)
        for stream in streams:
            client = Client(server)
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                client.session.data_received(stream[start:end])
            await asyncio.sleep(0)
            client.session.connection_lost(None)
            if shell.node is not None:
                shell.node.check()
        good = Client(server)
        good.greet()
        good.commit(good.reserve())
        server.close()
        good.session.connection_lost(None)
        await asyncio.sleep(0)
        shell.close()


@given(st.lists(st.lists(MESSAGES, max_size=8), max_size=4), st.lists(st.integers(0, 999)))
@examples(40)
def test_any_messages_end_their_own_session_at_worst(
    told: list[list[m.Message]], cuts: list[int]
) -> None:
    """In whatever order, with whatever in their fields: the next client is served."""
    streams = [stream_of([HELLO, *messages]) for messages in told]
    asyncio.run(serve(streams, sorted(cuts)))


@given(data=st.data())
@examples(40)
def test_damaged_streams_end_their_own_session_at_worst(data: st.DataObject) -> None:
    """Bytes cut, changed and put in, anywhere in a session."""
    messages = data.draw(st.lists(MESSAGES, max_size=5))
    # A whole greeting comes first: whose layout the pool has is no matter of damage.
    streams = [stream_of([HELLO]), data.draw(damaged(stream_of([HELLO, *messages])))]
    asyncio.run(serve(streams, []))


@pytest.mark.parametrize("length", [0, 1, FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1, (1 << 32) - 1])
def test_an_announced_length_costs_the_daemon_nothing(length: int) -> None:
    """A frame that never comes takes no memory, from whoever announced it."""
    stream = stream_of([HELLO]) + struct.pack("<I", length)
    asyncio.run(serve([stream_of([HELLO])], []))  # what the first session of all takes
    with costing_at_most(2 << 20):
        asyncio.run(serve([stream] * 20, []))


ANSWERS = st.one_of(
    st.builds(m.Welcome, IDS, IDS, st.text(max_size=9), st.binary(min_size=15, max_size=17), IDS,
              IDS, SECONDS),
    st.builds(m.Refused, st.text(max_size=9)),
    st.builds(m.Acquired, IDS, IDS, st.binary(max_size=9), IDS, IDS),
    st.builds(m.Reserved, IDS, IDS, st.binary(max_size=9)),
    st.builds(m.Committed, IDS, IDS, st.booleans()),
    st.builds(m.Status, IDS, st.text(max_size=9)),
)  # fmt: skip


@given(data=st.data())
@examples(80)
def test_any_answers_are_read_or_end_the_connection(data: st.DataObject) -> None:
    """A client of a daemon gone mad knows what to do: it goes on without."""
    answers = data.draw(st.lists(ANSWERS, max_size=6))
    stream = data.draw(damaged(stream_of([m.Pong(1), *answers])))
    near, far = socket.socketpair()
    far.sendall(stream)
    far.close()
    near.setblocking(False)
    connection = Connection(near, SystemClock())
    try:
        while True:
            for answer in connection.receive(0.0):
                slots: Any = getattr(answer, "slots", b"")
                assert isinstance(slots, bytes)
                if len(slots) % 4 == 0:
                    codec.split_slots(slots)
    except (UnavailableError, RefusedError):
        pass
    finally:
        connection.close()


@given(st.binary(max_size=100) | st.just(b"\x92\xdd\xff\xff\xff\xff\xa0"))
@examples(200)
def test_an_answer_of_mooncakes_client_is_read_or_refused(payload: bytes) -> None:
    """Nothing but the codec's own errors, and no memory for what is only claimed."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, InputError):
        answer_decoder.decode(payload)


RESULTS = st.builds(
    LoadResult, st.integers(0, 9), st.lists(st.integers(0, 9), unique=True, max_size=4),
    st.lists(st.binary(min_size=32, max_size=32), max_size=2), st.integers(0, 9),
)  # fmt: skip
REPORTS = st.builds(
    StepReport, st.integers(0, 5), st.dictionaries(st.sampled_from("ab"), RESULTS),
    st.dictionaries(st.integers(0, 3), st.integers(1, 2)),
)  # fmt: skip


@given(st.lists(REPORTS, min_size=1, max_size=4), st.randoms())
@examples(40)
def test_reports_of_ranks_add_up_in_any_order(reports: list[StepReport], random: Any) -> None:
    """A block that any rank missed is missed, whatever the ranks say and whoever is first."""

    def added(order: list[StepReport]) -> StepReport:
        total = StepReport()
        for report in order:
            total = total.aggregate(msgspec.convert(msgspec.to_builtins(report), StepReport))
        return total

    shuffled = list(reports)
    random.shuffle(shuffled)
    mine, other = added(reports), added(shuffled)

    assert mine.finished_stores == other.finished_stores
    for req_id, result in mine.loads.items():
        missed = {idx for report in reports if req_id in report.loads
                  for idx in report.loads[req_id].bad_blocks}  # fmt: skip
        assert set(result.bad_blocks) == set(other.loads[req_id].bad_blocks) == missed
