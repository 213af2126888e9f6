"""Everything that a stack starts before its daemon: servers of tiers, and servers that it names."""

import os
from pathlib import Path

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.stack.parts import Changed
from kvkeep.stack.servers.launch import find_program, launch_server
from kvkeep.stack.servers.named import with_server_ports
from kvkeep.stack.servers.named_part import NamedServerPart, find_command
from kvkeep.stack.servers.part import ServerPart
from kvkeep.stack.servers.ports import HeldPorts
from kvkeep.stack.servers.started import find_started, with_ports
from kvkeep.stack.spec import StackSpec


def check_programs(spec: StackSpec) -> None:
    """Refuse a stack whose programs are not here, before anything of it is started.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    for started in find_started(spec.daemon.tiers):
        find_program(started.kind)
    for server in spec.servers:
        find_command(server)
    for engine in spec.engines:
        if engine.python and not os.access(engine.python, os.X_OK):
            raise InputError(
                f"engine {engine.name}: python = {engine.python}: there is no such program; make "
                "that environment, or write the path of another one's interpreter."
            )


def with_chosen_ports(spec: StackSpec, ports: HeldPorts) -> StackSpec:
    """The stack with the ports of all its servers."""
    tiers = spec.daemon.tiers
    if spec.daemon.enabled:
        chosen = {each.tier_idx: each.port or ports.take() for each in find_started(tiers)}
        tiers = with_ports(tiers, chosen)
    daemon = msgspec.structs.replace(spec.daemon, tiers=tiers)
    return with_server_ports(msgspec.structs.replace(spec, daemon=daemon), ports.take)


def make_tier_servers(
    spec: StackSpec, ports: HeldPorts, folder: Path, changed: Changed
) -> list[ServerPart]:
    """The servers of tiers, none of them started; their daemon's, so none without it.

    Args:
        spec: Of the stack; its ports are chosen.
        ports: For what else servers listen on.
        folder: The stack's state folder.
        changed: Called when a process was started or ended.

    Raises:
        InputError: A program is not installed.
    """
    return [
        ServerPart(
            started,
            launch_server(started, ports.take),
            folder,
            start_timeout_s=spec.start_timeout_s,
            changed=changed,
        )
        for started in (find_started(spec.daemon.tiers) if spec.daemon.enabled else ())
    ]


def make_named_servers(
    spec: StackSpec, ports: HeldPorts, folder: Path, changed: Changed
) -> list[NamedServerPart]:
    """The servers that the file names, none of them started; as `make_tier_servers`."""
    return [
        NamedServerPart(
            server,
            folder,
            start_timeout_s=spec.start_timeout_s,
            changed=changed,
            let_go=ports.let_go,
        )
        for server in spec.servers
    ]
