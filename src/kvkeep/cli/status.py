"""``kvkeep status``: what a daemon holds and has done."""

import json
import os
from typing import Any

import click
import httpx
from rich.console import Console
from rich.table import Table

from kvkeep.client.connection import Connection
from kvkeep.daemon.metrics import COUNTERS
from kvkeep.daemon.settings import load_settings
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.protocol import messages as m
from kvkeep.protocol.versions import VERSION

TIMEOUT_S = 5.0
"""For the whole answer: a daemon answers within milliseconds or is frozen."""
_SCALES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@click.command()
@click.option("--socket", help="Control socket of the daemon; by default this user's own.")
@click.option("--url", help="Address of its metrics port instead, such as http://127.0.0.1:9100.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def status(socket: str | None, url: str | None, as_json: bool) -> None:
    """Show the pool, the leases and the counters of a daemon."""
    if socket is not None and url is not None:
        raise InputError("give either --socket or --url, not both")
    found = _ask_url(url) if url is not None else _ask_socket(socket)
    if as_json:
        click.echo(json.dumps(found))
    else:
        show(found, Console())


def _ask_socket(socket: str | None) -> dict[str, Any]:
    path = load_settings(None, os.environ, {"socket": socket} if socket else {}).socket_path
    try:
        connection = Connection.open(path, m.Hello(VERSION, "tool", "status"), TIMEOUT_S)
    except UnavailableError as error:
        raise UnavailableError(
            f"{error}: start one with kvkeep daemon, or name --socket"
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


def show(found: dict[str, Any], console: Console) -> None:
    """Print a status for a person; counters that are zero are left out."""
    pool, gauges, counters = found["pool"], found["gauges"], found["counters"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("pool", f"{pool['path']}, {readable_bytes(pool['bytes'])}")
    table.add_row("daemon", f"version {found['version']}, generation {found['generation']}, "
                  f"up {gauges['uptime_s']:.0f} s")  # fmt: skip
    if pool["layout"] is None:
        table.add_row("blocks", "none yet: no engine has come")
    else:
        layout = pool["layout"]
        table.add_row(
            "blocks",
            f"{gauges['slots_ready']:.0f} ready of {gauges['slots']:.0f}, "
            f"{readable_bytes(pool['block_bytes'])} each, {layout['block_tokens']} tokens, "
            f"{layout['dtype']}",
        )
    table.add_row("engines", f"{found['workers']} workers, {gauges['read_leases']:.0f} read leases,"
                  f" {gauges['write_leases']:.0f} write leases")  # fmt: skip
    for name, value in counters.items():
        if value:
            table.add_row(name, f"{value:,}  {COUNTERS.get(name, '')}")
    console.print(table)


def readable_bytes(num_bytes: int) -> str:
    """A size with a binary unit, such as 2.0 GiB."""
    for scale, unit in _SCALES:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"
