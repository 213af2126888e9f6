"""``kvkeep doctor``: what is installed and configured here, and whether it works.

Where a daemon serves, its tiers are its own and it is asked; otherwise each is opened, written to
and read from with throw-away keys. A disk tier's files are never touched: its folder's file system
is tried in a folder that is removed at the end.
"""

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from kvkeep.cli.asking import ask_status, asked_daemon
from kvkeep.cli.findings import (
    Finding,
    Level,
    fail,
    find_copier,
    find_limits,
    find_memory,
    find_packages,
    find_port,
    find_recognizer,
    find_socket,
    find_versions,
    is_locked,
    ok,
    speed_text,
    warn,
)
from kvkeep.cli.status import readable_bytes
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.movement.opening import open_tier
from kvkeep.daemon.movement.proving import prove_tier
from kvkeep.daemon.settings import DaemonSettings, load_settings
from kvkeep.daemon.tier_settings import (
    AnyTierSettings,
    DiskTierSettings,
    MooncakeTierSettings,
)
from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import CorruptDataError, InputError, RefusedError, UnavailableError
from kvkeep.tiers.disk.headers import NAME as FOLDER_LOCK

VALUE_BYTES = 1 << 20
"""Of the values that are written and read: about a block."""
DISK_BYTES = 64 << 20
"""Taken of a disk for the moment of the test."""
CLOSE_S = 2.0
START_S = 20.0
"""A client of Mooncake is a process that takes a second to start, more on a busy machine."""
TRY_AGAIN_S = 0.25
CONNECT_S = 2.0
EXIT_FAILED = 1
MEND_LOCKED = "end that one, or give each daemon a folder of its own"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is configured: one daemon, and what else a stack starts."""

    settings: DaemonSettings
    engine_ports: dict[str, int]
    """By the engines' names; of those that the stack starts."""
    started_tiers: frozenset[int]
    """Places in ``settings.tiers`` whose server the stack starts."""


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="A daemon's settings file.")
@click.option("--stack", type=click.Path(path_type=Path), help="A stack file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def doctor(config: Path | None, stack: Path | None, as_json: bool) -> None:
    """Check versions, memory, limits, ports, daemon and tiers; exit code 1 if one fails."""
    if config is not None and stack is not None:
        raise InputError("give either --config or --stack, not both")
    findings = []
    for finding in examine(make_plan(config, stack)):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.level.value:<5} {finding.what:<14} {finding.text}")
            if finding.mend:
                click.echo(f"{'':<20} -> {finding.mend}")
    if as_json:
        told = [
            {"level": each.level.value, "what": each.what, "text": each.text, "mend": each.mend}
            for each in findings
        ]
        click.echo(json.dumps({"findings": told}))
    if any(finding.level is Level.FAIL for finding in findings):
        click.get_current_context().exit(EXIT_FAILED)


def make_plan(config: Path | None, stack: Path | None) -> Plan:
    """Read what is configured.

    Raises:
        InputError: The file is wrong.
    """
    if stack is None:
        return Plan(load_settings(config, os.environ, {}), {}, frozenset())
    from kvkeep.stack.precedence import load_spec

    spec = load_spec(stack)
    ports = {engine.name: engine.port for engine in spec.engines if engine.url is None}
    started = (idx for idx, tier in enumerate(spec.daemon.tiers) if tier.get("start"))
    return Plan(spec.daemon_settings(), ports, frozenset(started))


def examine(plan: Plan) -> Iterator[Finding]:
    """Every finding, one after the other."""
    settings = plan.settings
    yield from find_versions()
    yield find_copier()
    yield find_recognizer()
    yield from find_packages()
    status, finding = find_daemon(settings)
    yield from find_memory(settings, is_serving=status is not None)
    yield from find_limits(settings)
    yield finding
    if status is None:
        yield find_port("metrics port", settings.metrics_port)
        for name, port in plan.engine_ports.items():
            yield find_port(f"port of {name}", port)
    yield configured(settings)
    for idx, tier in enumerate(settings.named_tiers):
        if status is not None:
            yield asked_tier(tier, status)
        elif idx in plan.started_tiers:
            yield ok(tier.name, "its server is started by kvkeep up: then ask again")
        else:
            yield tried_tier(tier)


def configured(settings: DaemonSettings) -> Finding:
    """What the daemon is told, in short."""
    tiers = ", ".join(tier.name for tier in settings.named_tiers) or "none"
    return ok(
        "configured",
        f"pool {readable_bytes(settings.pool_bytes)}, eviction {settings.eviction}, "
        f"planner {settings.planner}, tiers below the pool: {tiers}",
    )


def name_of(tier: AnyTierSettings) -> str:
    """As the daemon calls it; the kind of one that stands alone."""
    return tier.name or tier.kind


# ---- the daemon


def find_daemon(settings: DaemonSettings) -> tuple[dict[str, Any] | None, Finding]:
    """The status of the daemon at this socket, if one answers, and what to say of it."""
    try:
        with asked_daemon(settings.socket_path, "doctor") as connection:
            status = ask_status(connection)
    except UnavailableError:
        return None, find_socket(Path(settings.socket_path))
    except RefusedError as error:
        return None, fail("daemon", str(error), "run as its user, with the same kvkeep")
    layout = status["pool"]["layout"]
    text = (
        f"version {status['version']} answers at {settings.socket_path}; "
        f"{status['workers']} workers, "
    )
    text += "no engine has come yet" if layout is None else f"blocks of {layout['block_tokens']}"
    return status, ok("daemon", text)


def asked_tier(tier: AnyTierSettings, status: dict[str, Any]) -> Finding:
    """What the daemon that serves says of a tier."""
    name, movement = name_of(tier), status["movement"] or {}
    if name in movement.get("failed", {}):
        is_retried = name in movement.get("retried", [])
        then = (
            "the daemon tries it again within a minute"
            if is_retried
            else "then start the daemon anew"
        )
        mend = f"mend what is said; {then}"
        return fail(name, movement["failed"][name], mend)
    found = next((each for each in movement.get("tiers", []) if each["name"] == name), None)
    if found is None:
        if movement.get("is_open"):
            mend = "the daemon was started with other settings: start it anew"
            return warn(name, "the daemon has no such tier", mend)
        if isinstance(tier, DiskTierSettings) and name in movement.get("waiting", []):
            folder = Path(tier.folder).expanduser()
            if is_locked(folder / FOLDER_LOCK):
                return fail(name, f"another process uses {folder}", MEND_LOCKED)
        return ok(name, "is opened when the first engine has come")
    if found["breaker"] != "closed":
        mend = "see what answers there; it is tried again every two seconds"
        return fail(name, "calls fail or hang: left alone for now", mend)
    if isinstance(tier, DiskTierSettings) and (lost := _lost_folder(tier, found)):
        mend = "start the daemon anew: what it keeps there is gone when it ends"
        return fail(name, lost, mend)
    if found.get("proof") == "awaited":
        mend = "see what answers there; it is asked again every second"
        return fail(name, "has not answered yet: not used before it has given bytes back", mend)
    if found.get("proof") == "declined":
        mend = "make room there, or raise its limits"
        return warn(name, "open; it answers and keeps no value, so it is not proven yet", mend)
    speed = movement.get("bytes_per_s", {}).get(name)
    read = "" if speed is None else f", reads {readable_bytes(int(speed))}/s"
    return ok(name, f"open{read}")


def _lost_folder(settings: DiskTierSettings, found: dict[str, Any]) -> str:
    """What is wrong with the folder of a disk tier that a daemon has open; empty if nothing is.

    Files that were removed go on to serve the daemon which has them open, and nobody after it.
    """
    folder = Path(settings.folder).expanduser()
    if not folder.is_absolute():
        return ""  # as seen from where the daemon was started
    if not is_locked(folder / FOLDER_LOCK):
        return f"the daemon does not use {folder}: its folder was removed, or is another"
    if found.get("num_values") and not any(folder.glob("segment-*")):
        return f"the daemon's segments in {folder} were removed"
    return ""


# ---- tiers that no daemon holds


def tried_tier(settings: AnyTierSettings) -> Finding:
    """Open a tier, write and read a few values, and delete them."""
    name = name_of(settings)
    try:
        if isinstance(settings, DiskTierSettings):
            return _tried_disk(settings)
        if isinstance(settings, MooncakeTierSettings):
            # As a client only: what it lent to the store would be missing a moment later.
            settings = msgspec.structs.replace(settings, segment_bytes=0)
        return _found(settings, *_measured(settings))
    except InputError as error:
        return fail(name, str(error), "mend the tier's settings")
    except UnavailableError as error:
        return fail(name, str(error), "start what should answer there, or take the tier out")
    except CorruptDataError as error:
        return fail(name, str(error), "don't use it: what it gives back is not what it got")


def _found(settings: AnyTierSettings, reads: Sequence[tuple[int, float]], speed: str) -> Finding:
    """What to say of a tier that answers."""
    name = name_of(settings)
    if reads:
        return ok(name, speed)
    if isinstance(settings, MooncakeTierSettings):
        mend = "start what lends it memory: a daemon with segment_bytes, or a storage process"
        return warn(name, "its master answers, and it has no room for a value", mend)
    return warn(name, speed, "make room there, or raise its limits")


def _measured(settings: AnyTierSettings) -> tuple[list[tuple[int, float]], str]:
    """Write, read and delete a few values.

    Returns:
        Bytes and seconds of each read, none where nothing was kept; and the speed in words.
    """
    clock = SystemClock()
    tier = open_tier(settings, VALUE_BYTES, clock)
    try:
        reads = _proven(tier, settings, clock)
        return reads, speed_text(tier.queue.tier, reads)
    finally:
        if not tier.queue.close(CLOSE_S):
            tier.queue.tier.close()


def _proven(tier: LowerTier, settings: AnyTierSettings, clock: Clock) -> list[tuple[int, float]]:
    end_s = clock.now_s()
    if isinstance(settings, MooncakeTierSettings) and _is_listening(settings.master):
        end_s += START_S
    while True:
        try:
            return prove_tier(tier.queue.tier, VALUE_BYTES, lambda: tier.num_rejected)
        except UnavailableError:
            if clock.now_s() >= end_s:
                raise
            time.sleep(TRY_AGAIN_S)


def _is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _tried_disk(settings: DiskTierSettings) -> Finding:
    name, folder = name_of(settings), Path(settings.folder).expanduser()
    if is_locked(folder / FOLDER_LOCK):
        return fail(name, f"another process uses {folder}", MEND_LOCKED)
    there = folder
    while not there.is_dir():
        if there.exists() or there == there.parent:
            return fail(name, f"{there} is not a folder", "choose another folder")
        there = there.parent
    try:
        made = Path(tempfile.mkdtemp(prefix=".kvkeep-doctor-", dir=there))
    except OSError as error:
        mend = "choose another folder, or let this user write there"
        return fail(name, f"{there}: {error.strerror}", mend)
    try:
        small = msgspec.structs.replace(
            settings, folder=str(made / "tier"), capacity_bytes=DISK_BYTES
        )
        _, text = _measured(small)
        stats = os.statvfs(there)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    free = stats.f_bavail * stats.f_frsize
    held = sum(path.lstat().st_size for path in folder.glob("*.kvkeep")) if folder.is_dir() else 0
    text += f"; {readable_bytes(free)} free at {there}"
    if free + held < settings.capacity_bytes:
        size = readable_bytes(settings.capacity_bytes)
        return warn(name, text, f"lower capacity_bytes ({size}), or make room")
    return ok(name, text)
