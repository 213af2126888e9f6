"""One connection, with a test at the other end of a socket pair."""

import socket
from collections.abc import Iterator

import pytest

from kvkeep.client.connection import UNSENT_BYTES_MAX, Connection
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import RefusedError, UnavailableError
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import decode_to_daemon, encode
from kvkeep.protocol.frames import FrameReader


class Peer:
    """The daemon's end."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._frames = FrameReader()

    def hear(self, num_messages: int = 1) -> list[m.ToDaemon]:
        """Read until so many messages are there."""
        found: list[m.ToDaemon] = []
        while len(found) < num_messages:
            data = self.socket.recv(1 << 20)
            assert data, "the client has gone"
            found += [decode_to_daemon(payload) for payload in self._frames.feed(data)]
        return found

    def say(self, *answers: m.Message) -> None:
        """Send messages."""
        self.socket.sendall(b"".join(encode(answer) for answer in answers))


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Peer]]:
    """A connection and its other end."""
    mine, theirs = socket.socketpair()
    mine.setblocking(False)
    theirs.settimeout(5.0)
    connection = Connection(mine, SystemClock())
    yield connection, Peer(theirs)
    connection.close()
    theirs.close()


def big_question(request_id: int) -> m.Acquire:
    """The largest one there is."""
    return m.Acquire(request_id, b"n" * 32, 0, bytes(m.HASHES_MAX * 32), 1.0)


def test_an_answer_is_found_among_others(pair: tuple[Connection, Peer]) -> None:
    """Answers to questions given up earlier are dropped."""
    connection, peer = pair
    peer.say(m.Pong(1), m.Cleared(2, 0, 0), m.Pong(2))

    assert connection.call(m.Ping(2), m.Pong, 5.0) == m.Pong(2)


def test_no_answer_in_time_is_unavailable(pair: tuple[Connection, Peer]) -> None:
    """A call has a deadline."""
    with pytest.raises(UnavailableError, match="no answer within"):
        pair[0].call(m.Ping(1), m.Pong, 0.0)


def test_a_refusal_comes_with_its_reason(pair: tuple[Connection, Peer]) -> None:
    """The daemon's sentence reaches whoever waits."""
    connection, peer = pair
    peer.say(m.Refused("because"))

    with pytest.raises(RefusedError, match="because"):
        connection.call(m.Ping(1), m.Pong, 5.0)


def test_a_refusal_is_heard_even_when_sending_fails(pair: tuple[Connection, Peer]) -> None:
    """A daemon that refuses closes at once; its reason is still in the socket."""
    connection, peer = pair
    peer.say(m.Refused("too many"))
    peer.socket.close()

    with pytest.raises(RefusedError, match="too many"):
        connection.send(m.Ping(1))


def test_the_end_of_the_daemon_is_unavailable(pair: tuple[Connection, Peer]) -> None:
    """Reading and writing say the same."""
    connection, peer = pair
    peer.socket.close()

    with pytest.raises(UnavailableError, match="gone"):
        connection.receive(0.0)
    with pytest.raises(UnavailableError, match="gone"):
        connection.send(m.Ping(1))


def test_an_answer_that_can_not_be_read_is_unavailable(pair: tuple[Connection, Peer]) -> None:
    """Whoever speaks something else is no daemon of ours."""
    connection, peer = pair
    peer.socket.sendall(b"\x01\x00\x00\x00\xc1")

    with pytest.raises(UnavailableError, match="can't be read"):
        connection.receive(5.0)


def test_what_the_kernel_does_not_take_is_sent_later(pair: tuple[Connection, Peer]) -> None:
    """Sending never waits, and nothing is lost or mixed up."""
    connection, peer = pair
    sent = [big_question(1), big_question(2), m.Ping(3)]
    for message in sent:
        connection.send(message)

    heard: list[m.ToDaemon] = []
    while len(heard) < 3:
        heard += peer.hear(0) or _pump(connection, peer)
    assert heard == sent


def _pump(connection: Connection, peer: Peer) -> list[m.ToDaemon]:
    """Let the client send on while the daemon reads."""
    assert connection.receive(0.0) == []
    return [decode_to_daemon(p) for p in peer._frames.feed(peer.socket.recv(1 << 20))]


def test_a_daemon_that_never_reads_is_given_up(pair: tuple[Connection, Peer]) -> None:
    """What piles up has a limit."""
    connection, _ = pair
    room = UNSENT_BYTES_MAX // len(encode(big_question(0)))
    for request_id in range(room):
        connection.send(big_question(request_id))

    with pytest.raises(UnavailableError, match="does not read"):
        _send_many(connection, 16)


def _send_many(connection: Connection, num_messages: int) -> None:
    for request_id in range(num_messages):
        connection.send(big_question(request_id))


def test_nobody_there_is_unavailable() -> None:
    """A path without a daemon, and one that is too long for a socket."""
    hello = m.Hello(1, "tool", "test")
    for path in ("/nowhere/d.sock", "/tmp/" + "x" * 200):
        with pytest.raises(UnavailableError, match="no daemon answers"):
            Connection.open(path, hello, 1.0)
