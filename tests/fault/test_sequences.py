"""A daemon, its process for sequences, or a client dies or freezes in the middle of a body.

Whoever asks is told within its deadline, and nobody ever reads half a sequence.
"""

import concurrent.futures
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvkeep.client.sequences import SequenceClient
from kvkeep.model.errors import UnavailableError
from tests.integration.daemons import Daemon, wait_until
from tests.integration.sequences import (
    Layers,
    body_of,
    client_of,
    counted,
    head_of,
    joined,
    layers,
    raw_connection,
    read_answer,
    running_listener,
)
from tests.waiting import HANG_S

DEADLINE_S = 2.0
BEFORE = layers(1, 10)
BODY_BYTES_MAX = 64 << 20
BIG = layers(2, 150_000, 2, "float32")
"""36 MiB: more than two sockets hold between them, so that a frozen reader stops the sender."""
MORE = layers(3, 5)

Write = Callable[[SequenceClient, str], object]
WRITES: dict[str, Write] = {
    "put": lambda client, name: client.put(name, BIG),
    "append": lambda client, name: client.append(name, layers(2, 300_000)),
}
AFTER: dict[str, Callable[[], Layers]] = {
    "put": lambda: BIG,
    "append": lambda: joined(BEFORE, layers(2, 300_000)),
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One daemon for the tests that leave it alive."""
    with running_listener(body_bytes_max=BODY_BYTES_MAX) as running:
        yield running


def keeper(daemon: Daemon) -> int:
    """Pid of the process that keeps the sequences."""
    return int(daemon.status()["sequences"]["pid"])


def is_gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def queued_bytes(daemon: Daemon) -> int:
    """Bytes that lie at the listener's port, sent and not read by anybody."""
    port = f":{daemon.ready['sequences_port']:04X}"
    num_bytes = 0
    with open("/proc/net/tcp") as file:
        for line in file:
            fields = line.split()
            if fields[1].endswith(port) and fields[3] == "01":  # established
                num_bytes += int(fields[4].partition(":")[2], 16)
    return num_bytes


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that does nothing for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("write", WRITES)
def test_a_daemon_killed_in_mid_body(write: str) -> None:
    """The client is told at once; the next daemon has nothing, rather than half of something."""
    with (
        running_listener(body_bytes_max=BODY_BYTES_MAX) as daemon,
        client_of({"one": daemon}, deadline_s=10 * HANG_S) as client,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        client.put("chat", BEFORE)
        pid = keeper(daemon)
        os.kill(pid, signal.SIGSTOP)
        job = threads.submit(WRITES[write], client, "chat")
        wait_until(lambda: queued_bytes(daemon) > 1 << 16, "the body is on its way")
        daemon.kill()
        error = job.exception(HANG_S)
        wait_until(lambda: is_gone(pid), "the keeper dies with its daemon")
        daemon.start()
        with client_of({"one": daemon}) as again:
            found = again.get("chat")

        assert isinstance(error, UnavailableError)
        assert found is None


@pytest.mark.parametrize("write", WRITES)
def test_a_keeper_killed_in_mid_body(write: str) -> None:
    """The daemon stays and starts another one: on the same port, with nothing; engines go on."""
    with (
        running_listener(body_bytes_max=BODY_BYTES_MAX) as daemon,
        client_of({"one": daemon}, deadline_s=10 * HANG_S) as client,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        client.put("chat", BEFORE)
        pid = keeper(daemon)
        os.kill(pid, signal.SIGSTOP)
        job = threads.submit(WRITES[write], client, "chat")
        wait_until(lambda: queued_bytes(daemon) > 1 << 16, "the body is on its way")
        os.kill(pid, signal.SIGKILL)
        error = job.exception(HANG_S)
        wait_until(lambda: counted(daemon, "sequences_restarts") == 1, "another one")

        assert isinstance(error, UnavailableError)
        assert keeper(daemon) != pid
        assert client.get("chat") is None
        assert counted(daemon, "sequences") == 0
        client.put("chat", BEFORE)
        assert client.get("chat") == BEFORE


@pytest.mark.parametrize("write", WRITES)
def test_a_keeper_frozen_in_mid_body(daemon: Daemon, write: str) -> None:
    """The client gives up at its deadline; what is read later is the one or the other, whole."""
    name = f"frozen-{write}"
    with client_of({"one": daemon}) as patient:
        patient.put(name, BEFORE)
        with client_of({"one": daemon}, deadline_s=DEADLINE_S) as client:
            begun_s = time.perf_counter()
            with frozen(keeper(daemon)), pytest.raises(UnavailableError):
                WRITES[write](client, name)
            took_s = time.perf_counter() - begun_s
        wait_until(lambda: counted(daemon, "sequence_transfer_bytes") == 0, "it is let go")

        assert took_s < HANG_S
        assert patient.get(name) in (BEFORE, AFTER[write]())


@pytest.mark.parametrize("ask", ["get", "length", "delete"])
def test_a_frozen_keeper_is_not_waited_for(daemon: Daemon, ask: str) -> None:
    """Nobody waits longer than the deadline, and the daemon tells its status meanwhile."""
    with (
        client_of({"one": daemon}) as patient,
        client_of({"one": daemon}, deadline_s=0.5) as client,
    ):
        patient.put("waited-for", BEFORE)
        patient.put("witness", BEFORE)
        begun_s = time.perf_counter()
        with frozen(keeper(daemon)), pytest.raises(UnavailableError):
            getattr(client, ask)("waited-for")
        took_s = time.perf_counter() - begun_s
        with frozen(keeper(daemon)):
            assert counted(daemon, "sequences") > 0

    assert took_s < HANG_S


BODY = body_of(MORE)
HEADER_BYTES = 8 + int.from_bytes(BODY[:8], "little")


@pytest.mark.parametrize("method", ["PUT", "POST", "PATCH"])
@pytest.mark.parametrize(
    "num_bytes", [0, 5, 8, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 100, len(BODY) - 1]
)
def test_a_client_that_dies_in_mid_body(daemon: Daemon, method: str, num_bytes: int) -> None:
    """Nothing is changed, nothing makes room, and nothing of the body is held any longer."""
    with client_of({"one": daemon}) as client:
        client.put("kept", BEFORE)
        cut = counted(daemon, "sequence_requests_cut")
        with raw_connection(daemon) as sock:
            head = head_of(method, "/v1/sequences/kept", len(BODY))
            sock.sendall(head + BODY[:num_bytes])
            wait_until(lambda: counted(daemon, "sequence_transfer_bytes") > 0, "it is coming")
        wait_until(lambda: counted(daemon, "sequence_transfer_bytes") == 0, "it is let go")

        assert client.get("kept") == BEFORE
        assert counted(daemon, "sequence_requests_cut") == cut + 1


def test_the_last_byte_decides(daemon: Daemon) -> None:
    """Until it is there, readers find what was there before; then all of the new."""
    with client_of({"one": daemon}) as client, raw_connection(daemon) as sock:
        client.put("decided", BEFORE)
        sock.sendall(head_of("POST", "/v1/sequences/decided", len(BODY)) + BODY[:-1])
        wait_until(lambda: counted(daemon, "sequence_transfer_bytes") > 0, "it is coming")
        assert client.get("decided") == BEFORE
        sock.sendall(BODY[-1:])

        assert read_answer(sock)[0] == 200
        assert client.get("decided") == joined(BEFORE, MORE)


def test_a_sequence_deleted_while_it_grows(daemon: Daemon) -> None:
    """An append that must not begin a sequence finds none at its last byte, and changes nothing."""
    with client_of({"one": daemon}) as client, raw_connection(daemon) as sock:
        client.put("doomed", BEFORE)
        path = "/v1/sequences/doomed?create=false"
        sock.sendall(head_of("POST", path, len(BODY)) + BODY[:-1])
        wait_until(lambda: counted(daemon, "sequence_transfer_bytes") > 0, "it is coming")
        client.delete("doomed")
        sock.sendall(BODY[-1:])

        assert read_answer(sock)[0] == 404
        assert client.get("doomed") is None


def test_a_reader_that_stops_reading_keeps_nothing_for_ever() -> None:
    """It is cut off, and what it had been sent is held no longer."""
    with (
        running_listener(body_bytes_max=BODY_BYTES_MAX, request_s_max=5.0) as daemon,
        client_of({"one": daemon}) as client,
    ):
        client.put("big", BIG)
        with raw_connection(daemon) as sock:
            sock.sendall(head_of("GET", "/v1/sequences/big"))
            wait_until(lambda: counted(daemon, "sequence_transfer_bytes") > 0, "it is sent")
            client.delete("big")
            wait_until(lambda: counted(daemon, "sequence_transfer_bytes") == 0, "it is cut")

        assert counted(daemon, "sequence_requests_cut") == 1
        assert counted(daemon, "sequences_read") == 0


@pytest.mark.parametrize(
    "trickle",
    [b"HTTP/1.1 200 OK\r\n" + b"X-Slow: 1\r\n" * 2000, b"HTTP/1.1 200 OK\r\nContent-Length: 19999"],
)
def test_an_answer_that_trickles_is_given_up_at_the_deadline(trickle: bytes) -> None:
    """However often a byte comes: head and body have one deadline together."""
    trickle = trickle if b"Slow" in trickle else trickle + b"\r\n\r\n" + bytes(19_999)
    ended = threading.Event()

    def answer(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):
            sock.recv(1 << 16)
            for start in range(0, len(trickle), 10):
                if ended.wait(0.05):
                    break
                sock.sendall(trickle[start : start + 10])

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
        SequenceClient([f"http://127.0.0.1:{listener.getsockname()[1]}"], deadline_s=1.0) as client,
    ):
        job = threads.submit(answer, listener)
        begun_s = time.perf_counter()
        with pytest.raises(UnavailableError, match="in time"):
            client.get("slow")
        took_s = time.perf_counter() - begun_s
        ended.set()
        job.result()

    assert took_s < HANG_S
