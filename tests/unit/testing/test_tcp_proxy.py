"""The relay between a client and a server that fails when told."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kvkeep.testing.tcp_proxy import FaultyRelay, NetworkFault, Towards

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

DATA = bytes(range(256)) * 1000


class EchoServer:
    """Sends back what it gets."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._echo, args=(connection,)))
            self._threads[-1].start()

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        """End; connections end with their clients."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def relay() -> Iterator[FaultyRelay]:
    server = EchoServer()
    with FaultyRelay(server.address, seed=3) as relay:
        yield relay
    server.close()


@pytest.fixture
def client(relay: FaultyRelay) -> Iterator[socket.socket]:
    with socket.create_connection(relay.address, timeout=10) as client:
        yield client


def echoed(client: socket.socket, data: bytes) -> bytes:
    """Send, and receive until all is back or the connection ends."""
    sender = threading.Thread(target=_send, args=(client, data))
    sender.start()
    got = bytearray()
    try:
        while len(got) < len(data) and (piece := client.recv(1 << 16)):
            got += piece
    except ConnectionError:
        pass
    sender.join()
    return bytes(got)


def _send(client: socket.socket, data: bytes) -> None:
    try:
        client.sendall(data)
    except OSError:
        return


def test_a_healthy_network_changes_nothing(client: socket.socket, relay: FaultyRelay) -> None:
    """All bytes, both ways, counted; and the end of one side is told to the other."""
    assert echoed(client, DATA) == DATA
    assert relay.num_bytes == {Towards.CLIENT: len(DATA), Towards.SERVER: len(DATA)}
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""


@pytest.mark.parametrize("towards", list(Towards))
@pytest.mark.parametrize("after_bytes", [0, 1, 100_001])
def test_a_cut_is_at_its_byte(
    client: socket.socket, relay: FaultyRelay, towards: Towards, after_bytes: int
) -> None:
    """Exactly so many bytes pass in its direction, then the connection ends."""
    struck = relay.strike(NetworkFault.CUT, towards=towards, after_bytes=after_bytes)
    got = echoed(client, DATA)

    assert struck.is_set()
    assert DATA.startswith(got)
    assert relay.num_bytes[towards] == after_bytes


def test_after_healing_new_connections_work(relay: FaultyRelay, client: socket.socket) -> None:
    """A cut holds for every connection until it is healed."""
    relay.strike(NetworkFault.CUT)
    assert echoed(client, b"x") == b""
    with socket.create_connection(relay.address, timeout=10) as second:
        assert echoed(second, b"x") == b""
    relay.heal()
    with socket.create_connection(relay.address, timeout=10) as third:
        assert echoed(third, DATA) == DATA


def test_a_frozen_network_keeps_bytes(client: socket.socket, relay: FaultyRelay) -> None:
    """They come when it goes on."""
    struck = relay.strike(NetworkFault.FROZEN, towards=Towards.SERVER, after_bytes=10)
    client.sendall(DATA[:1000])
    assert struck.wait(10)
    got = client.recv(10)
    client.settimeout(0.05)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(10)
    relay.heal()
    while len(got) < 1000:
        got += client.recv(1000)

    assert got == DATA[:1000]


def test_a_slow_network_takes_its_time(client: socket.socket, relay: FaultyRelay) -> None:
    """As many bytes a second as were said, and all of them right."""
    relay.strike(NetworkFault.SLOW, bytes_per_s=200_000)
    begun_s = time.perf_counter()

    assert echoed(client, DATA[:40_000]) == DATA[:40_000]
    assert time.perf_counter() - begun_s > 0.15


def test_a_flipped_bit_is_one(client: socket.socket, relay: FaultyRelay) -> None:
    """In the chosen byte, once; the same bit for the same seed."""
    relay.strike(NetworkFault.BIT_FLIP, after_bytes=77_777)
    got = echoed(client, DATA)
    wrong = [at for at, (a, b) in enumerate(zip(got, DATA, strict=True)) if a != b]

    assert wrong == [77_777]
    assert (got[77_777] ^ DATA[77_777]).bit_count() == 1


def test_refused_connections_end(client: socket.socket, relay: FaultyRelay) -> None:
    """Those that were, and those that come."""
    assert echoed(client, b"x") == b"x"
    relay.strike(NetworkFault.REFUSED)
    assert echoed(client, b"x") == b""
    with socket.create_connection(relay.address, timeout=10) as second:
        assert echoed(second, b"x") == b""


def test_a_server_that_is_away_ends_connections() -> None:
    """A client sees what it would see without the relay, one step later."""
    with (
        FaultyRelay(("127.0.0.1", 1)) as relay,
        socket.create_connection(relay.address, timeout=10) as client,
    ):
        assert echoed(client, b"x") == b""


def test_a_slow_network_needs_a_speed(relay: FaultyRelay) -> None:
    """A mistake in a test is told at once."""
    with pytest.raises(ValueError, match="bytes_per_s"):
        relay.strike(NetworkFault.SLOW)
