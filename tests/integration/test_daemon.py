"""A real daemon over its real socket: what it promises to clients, users and other daemons."""

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvkeep.client.connection import Connection
from kvkeep.daemon.metrics import COUNTERS
from kvkeep.model.errors import RefusedError, UnavailableError
from kvkeep.model.layout import KvLayout
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import join_hashes
from kvkeep.protocol.frames import FRAME_BYTES_MAX
from kvkeep.protocol.versions import VERSION
from tests.integration.daemons import (
    CALL_TIMEOUT_S,
    COMMAND,
    NAMESPACE,
    Daemon,
    Worker,
    acquire,
    arguments,
    connect,
    hash_of,
    hashes_of,
    hello,
    load_right_or_not_at_all,
    opened_prefixes,
    running_daemon,
    wait_until,
)

SESSIONS_MAX = 40


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One daemon for the tests that leave it as they found it."""
    with running_daemon(sessions_max=SESSIONS_MAX) as running:
        yield running


class TestLending:
    def test_blocks_come_back_as_they_were_stored(self, daemon: Daemon) -> None:
        """What one session stores another one leases and loads, byte for byte."""
        hashes = hashes_of(1000, 100)
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            assert worker.store(hashes) == 100
            assert worker.store(hashes) == 0

            lease = acquire(client, hashes)
            assert lease is not None
            assert len(lease.slots) == 100
            client.release([lease], num_loaded=100)
            assert load_right_or_not_at_all(worker, client, hashes) == 100

        assert daemon.counter("blocks_stored") >= 100

    def test_a_prefix_ends_where_a_block_is_missing(self, daemon: Daemon) -> None:
        """Nothing behind a gap is lent: attention needs every block before it."""
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            worker.store([hash_of(2000), hash_of(2001), hash_of(2003)])

            lease = acquire(client, hashes_of(2000, 4))
            assert lease is not None
            assert len(lease.slots) == 2
            assert acquire(client, [hash_of(2002)]) is None

    def test_the_longest_question_is_answered(self, daemon: Daemon) -> None:
        """A question larger than the kernel takes at once costs nobody the session."""
        hashes = hashes_of(50_000, m.HASHES_MAX)
        with Worker(daemon) as worker, opened_prefixes(daemon, patience_s=5.0) as client:
            worker.store(hashes[:3])
            leases = [acquire(client, hashes) for _ in range(3)]

            assert [lease and len(lease.slots) for lease in leases] == [3, 3, 3]
            assert client.is_connected

    def test_a_lease_longer_than_the_daemon_grants_is_refused(self, daemon: Daemon) -> None:
        """Half a lease would leave an engine reading what is not lent."""
        connection = connect(daemon)
        with pytest.raises(RefusedError, match="raise lease_s_max of the daemon"):
            connection.call(m.Acquire(1, NAMESPACE, 0, b"", 3000.0), m.Acquired, CALL_TIMEOUT_S)
        connection.close()

    def test_a_corrupt_block_is_never_lent_again(self, daemon: Daemon) -> None:
        """A reader's report takes the block out, and it can be stored anew."""
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            worker.store([hash_of(3000)])
            before = daemon.counter("blocks_corrupt")
            client.report_corrupt(NAMESPACE, 0, [hash_of(3000)])

            assert acquire(client, [hash_of(3000)]) is None
            assert daemon.counter("blocks_corrupt") == before + 1
            assert worker.store([hash_of(3000)]) == 1


class TestRefusing:
    def test_another_layout_is_refused_and_blocks_stay(self, daemon: Daemon) -> None:
        """An engine with another block size or dtype is told what differs and what to do."""
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            worker.store([hash_of(4000)])
            for other in (
                KvLayout(4, 2, 1024, 32, "bfloat16", "test"),
                KvLayout(4, 2, 1024, 16, "float16", "test"),
            ):
                with pytest.raises(RefusedError, match="start it with the same settings, or give"):
                    Worker(daemon, layout=other)

            assert load_right_or_not_at_all(worker, client, [hash_of(4000)]) == 1

    def test_an_impossible_layout_is_refused(self, daemon: Daemon) -> None:
        """More pages than a block can have end the session, not the daemon."""
        wire = m.Layout(1 << 16, 1 << 16, 1 << 24, 16, "bfloat16", "test")
        with pytest.raises(RefusedError, match="layout out of range"):
            connect(daemon, m.Hello(VERSION, "worker", "test", wire))

    def test_another_protocol_is_refused_by_name(self, daemon: Daemon) -> None:
        """The sentence names both versions and the mend."""
        with pytest.raises(RefusedError, match=r"protocol 99, .* install the same kvkeep"):
            connect(daemon, m.Hello(99, "tool", "test"))

    @pytest.mark.parametrize(
        "data",
        [
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\xff" * 64,
            struct.pack("<I", FRAME_BYTES_MAX + 1),
            struct.pack("<I", 3) + b"\xc1\xc1\xc1",
            struct.pack("<I", 2) + b"\x92\x02",
            struct.pack("<I", 0),
        ],
        ids=["http", "ones", "too long", "not msgpack", "cut", "empty"],
    )
    def test_hostile_bytes_end_only_their_session(self, daemon: Daemon, data: bytes) -> None:
        """Whatever is sent, the sender is cut off and everybody else is served."""
        bystander = connect(daemon)
        with socket.socket(socket.AF_UNIX) as hostile:
            hostile.settimeout(CALL_TIMEOUT_S)
            hostile.connect(daemon.socket)
            hostile.sendall(data)
            while hostile.recv(4096):
                pass

        assert bystander.call(m.Ping(1), m.Pong, CALL_TIMEOUT_S).request_id == 1
        bystander.close()

    def test_a_request_before_the_greeting_is_refused(self, daemon: Daemon) -> None:
        """Nobody is lent anything before both sides know what they speak."""
        with pytest.raises(RefusedError, match="not expected in a new session"):
            Connection.open(
                daemon.socket, m.Acquire(1, NAMESPACE, 0, b"", 1.0), CALL_TIMEOUT_S  # type: ignore[arg-type]
            )  # fmt: skip

    def test_a_client_that_never_reads_is_cut_off(self, daemon: Daemon) -> None:
        """Answers pile up to a limit; others are served meanwhile."""
        before = daemon.counter("sessions_cut")
        deaf = connect(daemon)
        _ask_until_cut(deaf)
        deaf.close()

        wait_until(lambda: daemon.counter("sessions_cut") == before + 1, "it is counted")

    def test_too_many_sessions_are_refused(self, daemon: Daemon) -> None:
        """300 connections do not take the daemon's descriptors; those that stay are served."""
        kept: list[Connection] = []
        reasons = []
        for _ in range(300):
            try:
                kept.append(connect(daemon))
            except RefusedError as error:
                reasons.append(str(error))
        answers = [connection.call(m.Ping(7), m.Pong, CALL_TIMEOUT_S) for connection in kept]
        for connection in kept:
            connection.close()

        assert len(answers) == SESSIONS_MAX
        assert set(reasons) == {"too many sessions: raise sessions_max or stop an engine"}
        wait_until(lambda: _is_served(daemon), "served again")

    @pytest.mark.root
    def test_another_user_is_refused(self) -> None:
        """The socket's mode keeps others out; who gets past it is told whom it serves."""
        with running_daemon() as daemon:
            daemon.folder.chmod(0o711)
            assert "PermissionError" in _as_nobody(daemon.socket)
            os.chmod(daemon.socket, 0o666)
            assert "serves user 0 only" in _as_nobody(daemon.socket)


def _ask_until_cut(connection: Connection) -> None:
    """Ask, and read no answer; also while the daemon has not read what was asked before."""
    pause = threading.Event()
    while True:
        try:
            connection.send(m.GetStatus(1))
        except UnavailableError as error:
            if "is gone" in str(error):
                return
            pause.wait(0.01)


def _is_served(daemon: Daemon) -> bool:
    try:
        connect(daemon).close()
    except RefusedError:
        return False
    return True


def _as_nobody(path: str) -> str:
    """What another user gets when connecting."""
    code = (
        "import os, socket, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.settimeout(60)\n"
        f"sock.connect({path!r})\n"
        "print(sock.recv(4096))\n"
    )
    command = [COMMAND[0], "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


class TestWatching:
    def test_pages_over_http(self, daemon: Daemon) -> None:
        """Health, status and metrics answer, and Prometheus' own parser understands them."""
        assert json.loads(daemon.get("/health")) == {"status": "ok"}
        status = daemon.status()
        assert set(status["counters"]) == set(COUNTERS)
        families = {
            family.name: family
            for family in text_string_to_metric_families(daemon.get("/metrics").decode())
        }
        assert {f"kvkeep_{name}" for name in COUNTERS} <= set(families)
        for name, value in status["counters"].items():
            assert families[f"kvkeep_{name}"].type == "counter"
            assert families[f"kvkeep_{name}"].samples[0].value >= value
        assert families["kvkeep_slots_ready"].type == "gauge"

    def test_status_over_the_socket_is_the_same(self, daemon: Daemon) -> None:
        """A tool that has only the socket sees what a browser sees."""
        connection = connect(daemon)
        text = connection.call(m.GetStatus(1), m.Status, CALL_TIMEOUT_S).text
        connection.close()

        assert set(json.loads(text)) == set(daemon.status())

    def test_the_command_asks_either_way(self, daemon: Daemon) -> None:
        """``kvkeep status`` reads the same over the socket and over HTTP."""
        url = f"http://127.0.0.1:{daemon.ready['metrics_port']}"
        for place in (["--socket", daemon.socket], ["--url", url]):
            command = [*COMMAND[:-1], "status", "--json", *place]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            assert json.loads(done.stdout)["pool"]["path"] == str(daemon.pool)


class TestPrivacy:
    def test_only_this_user_can_reach_anything(self) -> None:
        """Folder, socket, lock and pool are this user's alone, whatever the umask."""
        before = os.umask(0)
        try:
            with running_daemon() as daemon:
                found = [daemon.folder, Path(daemon.socket), Path(f"{daemon.socket}.lock")]
                modes = [stat.S_IMODE(path.stat().st_mode) for path in [*found, daemon.pool]]
        finally:
            os.umask(before)

        assert modes == [0o700, 0o600, 0o600, 0o600]


class TestLeaks:
    def test_two_hundred_sessions_leave_nothing(self) -> None:
        """Clients that vanish without a word give back descriptors, leases and slots."""
        hashes = hashes_of(0, 32)
        with running_daemon() as daemon, Worker(daemon) as worker:
            worker.store(hashes)
            num_files = daemon.num_files()
            for number in range(200):
                connection = connect(daemon, hello("scheduler"))
                connection.call(
                    m.Acquire(1, NAMESPACE, 0, join_hashes(hashes), 30.0),
                    m.Acquired,
                    CALL_TIMEOUT_S,
                )
                assert number or daemon.gauge("read_leases") == 1
                connection.close()

            wait_until(lambda: daemon.gauge("read_leases") == 0, "leases are given back")
            wait_until(lambda: daemon.num_files() <= num_files, "descriptors are given back")
            assert daemon.gauge("slots_ready") == 32
            assert daemon.gauge("slots_doomed") == daemon.gauge("slots_fenced") == 0

    def test_workers_that_come_and_go_keep_no_slots(self) -> None:
        """The slots of their canaries are free again with their next greeting."""
        with running_daemon() as daemon:
            for _ in range(50):
                Worker(daemon).close()
            with Worker(daemon):
                wait_until(lambda: daemon.gauge("slots_fenced") == 0, "canaries' slots are free")
                assert daemon.gauge("slots_writing") == 1


class TestRestarting:
    def test_a_polite_end_keeps_the_blocks(self) -> None:
        """SIGTERM ends with code 0 and without a socket; the next daemon has every block."""
        hashes = hashes_of(0, 64)
        with running_daemon() as daemon:
            with Worker(daemon) as worker:
                worker.store(hashes)
            generation = daemon.ready["generation"]
            assert daemon.stop() == 0
            assert not Path(daemon.socket).exists()

            daemon.start()
            assert daemon.ready["generation"] == generation + 1
            assert daemon.counter("blocks_recovered") == 64
            with Worker(daemon) as worker, opened_prefixes(daemon) as client:
                assert load_right_or_not_at_all(worker, client, hashes) == 64


class TestBadInput:
    """Each ends with code 2 and one sentence on stderr, and changes nothing."""

    @staticmethod
    def refused(flags: dict[str, object], **environment: str) -> str:
        """The sentence with which a daemon does not start."""
        done = subprocess.run(
            [*COMMAND, *arguments(flags)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=dict(os.environ, **environment),
        )
        lines = [line for line in done.stderr.splitlines() if " INFO " not in line]
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert len(lines) == 1, done.stderr
        return lines[0]

    @pytest.fixture
    def flags(self, tmp_path: Path) -> dict[str, object]:
        """Settings with which a daemon would start."""
        return {"socket": tmp_path / "d.sock", "pool": tmp_path / "pool", "pool_bytes": "16MiB"}

    def test_an_unknown_setting(self, flags: dict[str, object], tmp_path: Path) -> None:
        """In a file and in the environment."""
        file = tmp_path / "d.yaml"
        file.write_text("pool_byte: 1GiB\n")

        assert "'pool_byte' is not a setting" in self.refused(flags | {"config": file})
        assert "KVKEEP_POOL_BYTE is not a" in self.refused(flags, KVKEEP_POOL_BYTE="1GiB")

    def test_tiers_that_can_not_be(self, flags: dict[str, object], tmp_path: Path) -> None:
        """What needs no medium to be judged ends the start, before anything is taken."""
        (tmp_path / "link").symlink_to("kv")
        disk = {"kind": "disk", "capacity_bytes": "1GiB"}
        disks = [disk | {"folder": str(tmp_path / name)} for name in ("kv", "link")]
        store = {"kind": "object_store", "url": "s3://kv1", "endpoint": "http://10.0.0.1:80"}
        keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hunter2"}

        for tiers, said in (
            (disks, "give each a folder of its own"),
            ([store], "the tier object_store: 10.0.0.1 would get keys and blocks in clear"),
            ([{"kind": "valkey", "url": "http://h"}], "the tier valkey: "),
        ):
            file = tmp_path / "d.yaml"
            file.write_text(json.dumps({"tiers": tiers}))
            assert said in self.refused(flags | {"config": file}, **keys)
            assert not Path(str(flags["pool"])).exists()

    def test_a_file_that_is_not_yaml(self, flags: dict[str, object], tmp_path: Path) -> None:
        """The sentence names the file and the place, on one line."""
        file = tmp_path / "d.yaml"
        file.write_text("a: [\n")

        assert f"{file} is not YAML" in self.refused(flags | {"config": file})

    def test_a_pool_larger_than_the_machine(self, flags: dict[str, object]) -> None:
        """Larger than memory, and larger than what is free where it lies."""
        sentence = self.refused(flags | {"pool_bytes": "60TiB"})
        assert "lower pool_bytes" in sentence

        shm = os.statvfs("/dev/shm")
        flags["pool"] = "/dev/shm/kvkeep-test-too-large.pool"
        flags["pool_bytes"] = shm.f_bavail * shm.f_frsize + (1 << 30)
        assert "lower pool_bytes" in self.refused(flags)
        assert not Path(str(flags["pool"])).exists()

    def test_a_socket_that_another_daemon_serves(
        self, daemon: Daemon, flags: dict[str, object]
    ) -> None:
        """The first daemon goes on."""
        sentence = self.refused(flags | {"socket": daemon.socket})
        assert "another daemon serves the socket" in sentence
        connect(daemon).close()

    def test_a_pool_that_another_daemon_holds(
        self, daemon: Daemon, flags: dict[str, object]
    ) -> None:
        """Its blocks stay, and the second daemon's socket is gone."""
        assert "another daemon holds the pool" in self.refused(flags | {"pool": daemon.pool})
        assert not Path(str(flags["socket"])).exists()
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            worker.store([hash_of(9000)])
            assert load_right_or_not_at_all(worker, client, [hash_of(9000)]) == 1

    def test_a_port_in_use(self, daemon: Daemon, flags: dict[str, object]) -> None:
        """It is noticed before any memory is taken."""
        sentence = self.refused(flags | {"metrics_port": daemon.ready["metrics_port"]})
        assert "choose another, or 0 for a free one" in sentence
        assert not Path(str(flags["pool"])).exists()

    def test_a_socket_path_that_is_too_long(self, flags: dict[str, object]) -> None:
        """Unix allows 107 bytes."""
        sentence = self.refused(flags | {"socket": "/tmp/" + "x" * 120})
        assert "choose a shorter path" in sentence

    def test_a_socket_path_that_is_a_file(self, flags: dict[str, object], tmp_path: Path) -> None:
        """The file stays."""
        file = tmp_path / "notes"
        file.write_text("mine")

        assert "is not a socket" in self.refused(flags | {"socket": file})
        assert file.read_text() == "mine"

    def test_a_socket_where_nobody_can_make_one(self, flags: dict[str, object]) -> None:
        """A path below a file, or in a folder that can't be made."""
        assert "can't be had" in self.refused(flags | {"socket": "/proc/kvkeep/d.sock"})

    def test_python_without_assertions(self, flags: dict[str, object]) -> None:
        """Half of the safety lies in assertions."""
        assert "without -O" in self.refused(flags, PYTHONOPTIMIZE="1")

    def test_a_daemon_killed_before_leaves_nothing_in_the_way(self) -> None:
        """The socket and the lock of a dead daemon are taken over."""
        with running_daemon() as daemon:
            daemon.signal(signal.SIGKILL)
            daemon.kill()
            assert Path(daemon.socket).exists()

            daemon.start()
            connect(daemon).close()
