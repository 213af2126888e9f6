"""``kvkeep status``: what a stack runs, and what a daemon holds and has done."""

import json
import os
from pathlib import Path
from typing import Any

import click
import httpx

from kvkeep.cli.target import describe, find_folder
from kvkeep.cli.target import show as show_stack
from kvkeep.client.connection import Connection
from kvkeep.daemon.metrics import COUNTERS
from kvkeep.daemon.settings import load_settings
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.protocol import messages as m
from kvkeep.protocol.versions import VERSION
from kvkeep.stack.record import StackRecord, require_ready

TIMEOUT_S = 5.0
"""For the whole answer: a daemon answers within milliseconds or is frozen."""
_SCALES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@click.command()
@click.argument("stack", required=False)
@click.option("--state-dir", type=click.Path(path_type=Path), help="The stack's state folder.")
@click.option("--socket", help="Control socket of the daemon; by default this user's own.")
@click.option("--url", help="Address of its metrics port instead, such as http://127.0.0.1:9100.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def status(
    stack: str | None, state_dir: Path | None, socket: str | None, url: str | None, as_json: bool
) -> None:
    """Show the pool, the leases and the counters of a daemon.

    With STACK, a name or a stack file, of that stack's daemon, and where its engines are.
    """
    if sum(given is not None for given in (stack, socket, url)) > 1:
        raise InputError("name one daemon: by a stack, by --socket or by --url")
    if stack is not None:
        folder = find_folder(stack, state_dir)
        _show_stack_status(require_ready(folder), folder, as_json)
        return
    if state_dir is not None:
        raise InputError("--state-dir belongs to a stack: name the stack too")
    found = _ask_url(url) if url is not None else _ask_socket(socket)
    if as_json:
        click.echo(json.dumps(found))
    else:
        show(found)


def _show_stack_status(record: StackRecord, folder: Path, as_json: bool) -> None:
    """Show a stack, and the status of its daemon if it has one of its own."""
    told = {"stack": describe(record, folder)}
    if not as_json:
        show_stack(record, folder)
    if record.daemon is not None:
        found = _ask_socket(record.daemon.socket)
        told |= found
        if not as_json:
            show(found)
    if as_json:
        click.echo(json.dumps(told))


def _ask_socket(socket: str | None) -> dict[str, Any]:
    path = load_settings(None, os.environ, {"socket": socket} if socket else {}).socket_path
    try:
        connection = Connection.open(path, m.Hello(VERSION, "tool", "status"), TIMEOUT_S)
    except UnavailableError as error:
        raise UnavailableError(
            f"{error}: start one with kvkeep daemon, or name a stack or --socket"
        ) from error
    try:
        request = m.GetStatus(connection.next_request_id())
        found: dict[str, Any] = json.loads(connection.call(request, m.Status, TIMEOUT_S).text)
    finally:
        connection.close()
    return found


def _ask_url(url: str) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url.rstrip('/')}/status", timeout=TIMEOUT_S, trust_env=False)
        found = answer.raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UnavailableError(
            f"no daemon answers at {url} ({error}): see metrics_port in what it prints at its start"
        ) from error
    if not isinstance(found, dict) or not {"pool", "gauges", "counters"} <= set(found):
        raise UnavailableError(f"{url} is not a daemon of kvkeep: see what it prints at its start")
    return found


def show(found: dict[str, Any]) -> None:
    """Print a status for a person; counters that are zero are left out.

    One line each, whole at any width: a path that is cut can't be used.
    """
    pool, gauges, counters = found["pool"], found["gauges"], found["counters"]
    rows = [
        ("pool", f"{pool['path']}, {readable_bytes(pool['bytes'])}"),
        (
            "daemon",
            f"version {found['version']}, generation {found['generation']}, "
            f"up {gauges['uptime_s']:.0f} s",
        ),
        ("blocks", _describe_blocks(pool, gauges)),
        (
            "engines",
            f"{found['workers']} workers, {gauges['read_leases']:.0f} read leases, "
            f"{gauges['write_leases']:.0f} write leases",
        ),
    ]
    if found.get("sequences") is not None:
        rows.append(("sequences", _describe_sequences(found["sequences"])))
    for name, value in counters.items():
        if value:
            rows.append((name, f"{value:,}  {COUNTERS.get(name, '')}"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}".rstrip())


def _describe_blocks(pool: dict[str, Any], gauges: dict[str, float]) -> str:
    layout = pool["layout"]
    if layout is None:
        return "none yet: no engine has come"
    return (
        f"{gauges['slots_ready']:.0f} ready of {gauges['slots']:.0f}, "
        f"{readable_bytes(pool['block_bytes'])} each, {layout['block_tokens']} tokens, "
        f"{layout['dtype']}"
    )


def _describe_sequences(told: dict[str, Any]) -> str:
    gauges, counters = told["gauges"], told["counters"]
    return (
        f"{gauges['sequences']}, {readable_bytes(gauges['sequence_bytes'])}, on port "
        f"{told['port']}; {counters['sequences_put'] + counters['sequences_appended']} written, "
        f"{counters['sequences_read']} read, {counters['sequences_missed']} missed, "
        f"{counters['sequences_evicted']} evicted"
    )


def readable_bytes(num_bytes: int) -> str:
    """A size with a binary unit, such as 2.0 GiB."""
    for scale, unit in _SCALES:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"
