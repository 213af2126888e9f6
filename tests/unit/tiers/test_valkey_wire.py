"""Commands, replies and addresses of Valkey servers, over a pair of sockets."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError
from kvkeep.tiers.valkey_wire import (
    BUFFER_BYTES,
    REPLY_BYTES_MAX,
    ErrorReply,
    ServerAddress,
    WireConnection,
    pack_command,
    parse_url,
)


def soon_s() -> float:
    """Enough for anything that works."""
    return SystemClock().now_s() + 10.0


@pytest.fixture
def ends() -> Iterator[tuple[WireConnection, socket.socket]]:
    """Our connection, and the server's end."""
    near, far = socket.socketpair()
    connection = WireConnection(near)
    yield connection, far
    connection.close()
    far.close()


Ends = tuple[WireConnection, socket.socket]


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"+OK\r\n", b"OK"),
        (b":-12\r\n", -12),
        (b"$-1\r\n", None),
        (b"$4\r\na\r\nb\r\n", b"a\r\nb"),
        (b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nx\r\n", [b"0", [b"x"]]),
        (b"*0\r\n", []),
        (b"-OOM no room\x1b[2J\r\n", ErrorReply("OOM", "OOM no room?[2J")),
    ],
)
def test_a_reply_is_read(ends: Ends, data: bytes, reply: object) -> None:
    """Each kind, and the stream stands behind it."""
    connection, far = ends
    far.sendall(data + b"+NEXT\r\n")

    assert connection.read_reply(soon_s()) == reply
    assert connection.read_reply(soon_s()) == b"NEXT"


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"$1_0\r\n",
        b":\r\n",
        b"$3\r\nabcde",
        b"*1\r\n*1\r\n*1\r\n:1\r\n",
        b"x" * (BUFFER_BYTES + 1),
        b"$%d\r\n" % (REPLY_BYTES_MAX + 1),
        b"*1000000000000\r\n" + b":1\r\n" * 9,
    ],
)
def test_another_protocol_is_a_lost_connection(ends: Ends, data: bytes) -> None:
    """Nonsense is refused, and a length alone takes no memory."""
    connection, far = ends
    far.sendall(data)
    far.shutdown(socket.SHUT_WR)

    with pytest.raises(ConnectionError):
        connection.read_reply(soon_s())


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_a_lost_connection(data: bytes) -> None:
    """Nothing that a server sends breaks anything else."""
    near, far = socket.socketpair()
    connection = WireConnection(near)
    far.sendall(data)
    far.shutdown(socket.SHUT_WR)
    try:
        while True:
            connection.read_reply(soon_s())
    except ConnectionError:
        pass
    finally:
        connection.close()
        far.close()


def test_a_value_goes_into_pieces(ends: Ends) -> None:
    """Longer than all buffers, in pieces, with a line before and after."""
    connection, far = ends
    value = bytes(range(256)) * 8192
    sender = threading.Thread(
        target=far.sendall, args=(b"$%d\r\n%s\r\n+OK\r\n" % (len(value), value),)
    )
    sender.start()
    into = bytearray(len(value))
    room = memoryview(into)

    assert connection.read_bulk_length(soon_s()) == len(value)
    for piece in (room[:10], room[10:5000], room[5000:]):
        connection.read_into(piece, soon_s())
    connection.end_bulk(soon_s())
    assert connection.read_reply(soon_s()) == b"OK"
    assert into == value

    sender.join()


def test_pieces_go_out_in_order(ends: Ends) -> None:
    """More than the kernel takes at once, in number and in bytes."""
    connection, far = ends
    pieces = [bytes([number % 256]) * (number * 5 % 4000) for number in range(2000)]
    got = bytearray()

    def receive() -> None:
        while data := far.recv(1 << 16):
            got.extend(data)

    receiver = threading.Thread(target=receive)
    receiver.start()
    connection.send(pieces, soon_s())
    connection.close()
    receiver.join()

    assert got == b"".join(pieces)


def test_silence_ends_in_time(ends: Ends) -> None:
    """Waiting for the second half of a value ends with the time given."""
    connection, far = ends
    far.sendall(b"$100\r\n" + b"x" * 50)
    begun_s = time.perf_counter()
    assert connection.read_bulk_length(soon_s()) == 100

    with pytest.raises(TimeoutError):
        connection.read_into(memoryview(bytearray(100)), SystemClock().now_s() + 0.05)

    assert 0.04 < time.perf_counter() - begun_s < 60


def test_nobody_reading_ends_in_time(ends: Ends) -> None:
    """So does sending to one who does not take it."""
    connection, _ = ends

    with pytest.raises(TimeoutError):
        connection.send([bytes(8 << 20)], SystemClock().now_s() + 0.05)


def test_time_that_is_over(ends: Ends) -> None:
    """Even bytes that are there are not waited for after the end."""
    connection, far = ends
    far.sendall(b"+OK\r\n")

    with pytest.raises(TimeoutError):
        connection.read_reply(SystemClock().now_s() - 1)


def test_a_command_is_packed() -> None:
    """As a list of strings with their lengths in bytes."""
    assert pack_command("GET", "ä", 12) == b"*3\r\n$3\r\nGET\r\n$2\r\n\xc3\xa4\r\n$2\r\n12\r\n"


@pytest.mark.parametrize(
    ("url", "address", "user", "password"),
    [
        ("valkey://h", ServerAddress("h", 6379), None, None),
        ("redis://u:p%40@h:1/3", ServerAddress("h", 1, database=3), "u", "p@"),
        ("rediss://:p@h/", ServerAddress("h", 6379, is_tls=True), None, "p"),
        ("valkeys://[::1]:7", ServerAddress("::1", 7, is_tls=True), None, None),
        ("unix:///run/v.sock", ServerAddress(unix_path="/run/v.sock"), None, None),
    ],
)
def test_an_address_is_read(
    url: str, address: ServerAddress, user: str | None, password: str | None
) -> None:
    """Host, port, database, and what opens it."""
    assert parse_url(url) == (address, user, password)


@pytest.mark.parametrize(
    "url",
    [
        *("", "h:1", "http://h", "valkey://", "valkey://s3cret@h:x", "valkey://h/a", "unix://"),
        *("valkey://:s3cret@h/0?x=1", "valkey://h:99999"),
        *("valkey://[::1", "valkey://h:0", "valkey://ho st:1", "valkey://a..b:1"),
        *(f"valkey://{'a' * 70}:1", "valkey://h/99999999999999999999", "valkey://h/2147483648"),
        *(f"unix:///{'a' * 107}", "unix:///a%00b", "valkey://h\n:1"),
    ],
)
def test_another_address_is_refused(url: str) -> None:
    """Without repeating it: it may hold a password."""
    with pytest.raises(InputError) as caught:
        parse_url(url)

    assert "s3cret" not in str(caught.value)
    assert "`url`" in str(caught.value)
