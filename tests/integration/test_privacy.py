"""Who can reach a daemon, and from where: this user, over one socket and loopback."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.client.connection import Connection
from kvkeep.model.errors import RefusedError
from tests.integration.daemons import Daemon, Worker, hashes_of, hello, running_daemon
from tests.servers.listening import children_of

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and the one within the other, as /proc/net writes them."""
TCP_LISTEN = "0A"


def sockets_of(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found.add(target[len("socket:[") : -1])
    return found


def rows_of(pid: int, table: str) -> list[list[str]]:
    """Lines of a table of the kernel about a process's sockets."""
    inodes, place = sockets_of(pid), 6 if table == "unix" else 9
    rows = [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
    return [row for row in rows if row[place] in inodes]


def family_of(pid: int) -> list[int]:
    """Processes that it began, and those that they began."""
    found = []
    for child in children_of(pid):
        found += [child, *family_of(child)]
    return found


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with a tier and quotas that serves a worker."""
    tier = {"kind": "disk", "folder": str(tmp_path / "disk"), "capacity_bytes": "64MiB"}
    config = tmp_path / "daemon.yaml"
    config.write_text(json.dumps({"tiers": [tier], "quotas": {"search": 0.5}}))
    with running_daemon(config=config) as found:
        yield found


def test_a_daemon_listens_on_its_socket_and_on_loopback_only(daemon: Daemon) -> None:
    """Nothing that it or its children opened can be reached from another machine."""
    with Worker(daemon) as worker:
        worker.store(hashes_of(0, 4))
        listening, paths = set(), set()
        for pid in [daemon.pid, *family_of(daemon.pid)]:
            for table in ("tcp", "tcp6"):
                for row in rows_of(pid, table):
                    address, _, port = row[1].rpartition(":")
                    assert address in LOOPBACK
                    if row[3] == TCP_LISTEN:
                        listening.add(int(port, 16))
            for table in ("udp", "udp6", "raw", "raw6"):
                assert rows_of(pid, table) == []
            paths |= {row[7] for row in rows_of(pid, "unix") if len(row) > 7}

    assert listening == {daemon.ready["metrics_port"]}
    assert paths == {daemon.socket}


def test_a_quota_is_shown_with_what_is_held(daemon: Daemon) -> None:
    """The tenant by its name, and all that have no share of their own."""
    with Worker(daemon) as worker:
        worker.store(hashes_of(0, 4))
        tenants = daemon.status()["tenants"]

    assert set(tenants) == {"search", "others"}
    assert tenants["others"]["tenant_blocks"] == 4
    assert tenants["search"]["tenant_quota_blocks"] > 0


IMPOSTOR = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen()
print("ready", flush=True)
sock.accept()[0].recv(1)
"""


@pytest.fixture
def impostor() -> Iterator[str]:
    """A socket on which another user listens."""
    folder = Path(tempfile.mkdtemp(prefix=f"kvkeep-{os.getpid()}-"))
    folder.chmod(0o777)
    path = str(folder / "d.sock")
    command = [sys.executable, "-c", IMPOSTOR, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60.0)[0]
        assert process.stdout.readline() == b"ready\n"
        yield path
        process.send_signal(signal.SIGKILL)
    shutil.rmtree(folder)


@pytest.mark.root
def test_an_engine_trusts_no_daemon_of_another_user(impostor: str) -> None:
    """Whoever sits on the socket's path first is refused before a word is said."""
    with pytest.raises(RefusedError, match="belongs to user 65534"):
        Connection.open(impostor, hello("scheduler"), 60.0)
