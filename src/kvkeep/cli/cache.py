"""``kvkeep cache``: what the tiers of a daemon keep; list, verify and clear it."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from kvkeep.cli.asking import ask_status, asked_daemon, checked_text
from kvkeep.cli.status import readable_bytes
from kvkeep.client.connection import Connection
from kvkeep.client.told import told
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import HASH_BYTES
from kvkeep.protocol import messages as m

POOL = "pool"
EXIT_ROTTEN = 1
EXIT_LEFT_OUT = 1


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """What every command of the group can be told."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")(command)
    return click.option("--socket", help="Control socket of the daemon; by default this user's.")(
        command
    )


@click.group()
def cache() -> None:
    """Look at, verify and clear what a daemon keeps, tier by tier."""


# ---- stat


@cache.command()
@_options
def stat(socket: str | None, as_json: bool) -> None:
    """Show what each tier holds, how often it had what was asked, and how fast it is."""
    with asked_daemon(socket, "cache stat") as connection:
        rows = rows_of(ask_status(connection))
    if as_json:
        click.echo(json.dumps({"tiers": rows}))
        return
    table = Table(box=None, pad_edge=False)
    for head in ("tier", "state", "blocks", "bytes", "capacity", "hits of asked", "reads"):
        table.add_column(head)
    for row in rows:
        speed = row["bytes_per_s"]
        table.add_row(
            row["tier"],
            row["state"],
            "?" if row["num_blocks"] is None else f"{row['num_blocks']:,}",
            _size(row["used_bytes"]),
            _size(row["capacity_bytes"]),
            f"{row['num_hits']:,} of {row['num_asked']:,}",
            "not measured" if not speed else f"{readable_bytes(int(speed))}/s",
        )
    Console().print(table)
    if any(row["state"] == "open" and row["num_blocks"] is None for row in rows):
        click.echo("(?: only the server knows; cache ls names the blocks of a tier)")


def _size(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else readable_bytes(num_bytes)


def rows_of(status: dict[str, Any]) -> list[dict[str, Any]]:
    """A status as one row for each tier, the pool first; None where something is not known."""
    gauges, counters, movement = status["gauges"], status["counters"], status["movement"] or {}
    block_bytes, speeds = status["pool"]["block_bytes"], movement.get("bytes_per_s", {})
    pool = {
        "tier": POOL,
        "state": "open" if gauges["slots"] else "no engine has come",
        "num_blocks": int(gauges["slots_ready"]),
        "used_bytes": int(gauges["slots_ready"]) * block_bytes,
        "capacity_bytes": int(gauges["slots"]) * block_bytes,
        "num_asked": counters["lookup_blocks"],
        "num_hits": counters["blocks_lent"],
        "bytes_per_s": speeds.get(POOL),
    }
    rows = [pool]
    for tier in movement.get("tiers", []):
        reads = tier["reads"] or {}
        rows.append(
            {
                "tier": tier["name"],
                "state": _state_of(tier),
                "num_blocks": tier["num_values"],
                "used_bytes": tier["used_bytes"],
                "capacity_bytes": tier["capacity_bytes"],
                "num_asked": reads.get("num_keys", 0),
                "num_hits": reads.get("num_done", 0),
                "bytes_per_s": speeds.get(tier["name"]),
            }
        )
    for kind, reason in _closed_of(movement).items():
        none = dict.fromkeys(("num_blocks", "used_bytes", "capacity_bytes", "bytes_per_s"))
        rows.append({"tier": kind, "state": reason, **none, "num_asked": 0, "num_hits": 0})
    return rows


def _closed_of(movement: dict[str, Any]) -> dict[str, str]:
    """Tiers that are not open, with the reason."""
    why = dict.fromkeys(movement.get("waiting", []), "it is opened when the first engine has come")
    why |= dict.fromkeys(movement.get("opening", []), "it is just being opened")
    why.update(movement.get("failed", {}))
    return why


def _state_of(tier: dict[str, Any]) -> str:
    if tier["breaker"] != "closed":
        return f"left alone ({tier['breaker']})"
    return "not proven yet" if tier["proof"] == "awaited" else "open"


def tiers_of(status: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Names of the tiers that can be asked, the pool first; and of the others, with the reason."""
    movement = status["movement"] or {}
    why = _closed_of(movement)
    tiers = movement.get("tiers", [])
    silent = [tier["name"] for tier in tiers if tier["proof"] == "awaited"]
    why |= dict.fromkeys(silent, "it has not answered yet")
    names = dict.fromkeys([POOL, *(tier["name"] for tier in tiers)])
    return [name for name in names if name not in why], why


def _say_left_out(left_out: dict[str, str], what: str) -> None:
    """To a person, which of all tiers nothing was done to; the exit code says so to a script."""
    for name, why in left_out.items():
        click.echo(f"{name}: not {what}: {why}", err=True)
    if left_out:
        click.get_current_context().exit(EXIT_LEFT_OUT)


# ---- ls


@cache.command("ls")
@click.option("--tier", default=POOL, show_default=True, help="Whose blocks; see cache stat.")
@click.option("--namespace", help="Only blocks of this one, 64 hexadecimal digits.")
@click.option("--limit", default=100, show_default=True, help="At most so many keys.")
@_options
def list_keys(
    tier: str, namespace: str | None, limit: int, socket: str | None, as_json: bool
) -> None:
    """List keys: namespace, block hash and group."""
    if not 1 <= limit <= m.KEYS_MAX:
        raise InputError(f"--limit {limit} can't be: choose 1 to {m.KEYS_MAX}")
    name = None if namespace is None else parse_namespace(namespace)
    checked_text(tier, "--tier")
    with asked_daemon(socket, "cache ls") as connection:
        request = m.ListKeys(connection.next_request_id(), tier, name, limit)
        (found,) = told(connection, request)
    if as_json:
        click.echo(json.dumps(found))
        return
    for key in found["keys"]:
        click.echo(f"{key['namespace']} {key['block_hash']} {key['group_idx']}")
    if missing := sentence_of_missing(found, limit):
        click.echo(f"({missing})", err=True)


def sentence_of_missing(found: dict[str, Any], limit: int) -> str:
    """Why a listing is not, or may not be, all there is; empty where it is."""
    sentences = []
    if not found["can_list"]:
        sentences.append(
            f"{found['tier']} can't list its keys: these are the ones that this daemon wrote or "
            "read since its start, and there may be others"
        )
    if found["has_more"]:
        sentences.append(f"there are more than {limit}: choose another --limit or a --namespace")
    return "; ".join(sentences)


def parse_namespace(text: str) -> bytes:
    """A namespace from its hexadecimal digits.

    Raises:
        InputError: It is none.
    """
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != HASH_BYTES:
        raise InputError(f"{text!r} is no namespace: give {2 * HASH_BYTES} hexadecimal digits")
    return found


# ---- verify


@cache.command()
@click.option(
    "--tier", "tiers", multiple=True, help="Which tier; may be repeated. All if left out."
)
@_options
def verify(tiers: Sequence[str], socket: str | None, as_json: bool) -> None:
    """Read every block and compare digests; what is rotten is removed, and the exit code is 1.

    Where no tier is named and one can't be looked at, it is 1 as well.
    """
    results = []
    for name in tiers:
        checked_text(name, "--tier")
    with asked_daemon(socket, "cache verify") as connection:
        known, left_out = tiers_of(ask_status(connection))
        left_out = {} if tiers else left_out
        for name in tiers or known:
            try:
                found = _verified(connection, name)
            except UnavailableError as error:
                if tiers:
                    raise
                left_out[name] = str(error)
                continue
            results.append(found)
            if not as_json:
                click.echo(sentence_of_verified(found))
    if as_json:
        click.echo(json.dumps({"tiers": results, "left_out": left_out}))
    _say_left_out(left_out, "verified")
    if any(found["num_rotten"] for found in results):
        click.get_current_context().exit(EXIT_ROTTEN)


def _verified(connection: Connection, name: str) -> dict[str, Any]:
    """What was found in one tier, in the end.

    Raises:
        UnavailableError: It can't be read now.
    """
    found: dict[str, Any] = {}
    try:
        for found in told(connection, m.VerifyTier(connection.next_request_id(), name)):
            _progress(f"{name}: {found['num_checked']:,} blocks checked")
    finally:
        _progress("")
    return found


def sentence_of_verified(found: dict[str, Any]) -> str:
    """What was found in one tier."""
    text = (
        f"{found['tier']}: {found['num_right']:,} right, {found['num_rotten']:,} rotten and "
        f"removed, {found['num_unread']:,} not read (gone meanwhile, or another layout)"
    )
    if not found["can_list"]:
        text += "; it can't list its keys: only those that this daemon remembers were read"
    return text


def _progress(text: str) -> None:
    """Say where it stands, to a person only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


# ---- clear


@cache.command()
@click.option(
    "--tier", "tiers", multiple=True, help="Which tier; may be repeated. All if left out."
)
@click.option("--yes", is_flag=True, help="Clear every tier without naming one.")
@_options
def clear(tiers: Sequence[str], yes: bool, socket: str | None, as_json: bool) -> None:
    """Forget the blocks of tiers; says what was cleared and what is kept because it is lent.

    Of a shared store only blocks under this daemon's own prefix are removed. Where no tier is named
    and one can't be cleared now, the others are, and the exit code is 1.
    """
    results = []
    for name in tiers:
        checked_text(name, "--tier")
    with asked_daemon(socket, "cache clear") as connection:
        known, left_out = tiers_of(ask_status(connection))
        if not tiers and not yes:
            raise InputError(
                f"this clears {', '.join(known)}: repeat it with --yes, or choose with --tier"
            )
        names = list(tiers or known)
        failed: dict[str, str] = {}
        for found in told(connection, m.ClearTiers(connection.next_request_id(), names)):
            if "left_out" in found:
                failed[found["tier"]] = found["left_out"]
                continue
            results.append(found)
            if not as_json:
                click.echo(sentence_of(found))
    left = [name for name in (*known, *left_out) if name != POOL and name not in names]
    left_out = failed if tiers else left_out | failed
    if as_json:
        click.echo(json.dumps({"tiers": results, "left_out": left_out}))
    elif tiers and POOL in names and left:
        click.echo(f"{', '.join(left)}: not cleared; what is there comes back when it is asked for")
    if tiers and failed:
        raise UnavailableError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    _say_left_out(left_out, "cleared")


def sentence_of(found: dict[str, Any]) -> str:
    """What was done to one tier."""
    text = f"{found['tier']}: {found['num_cleared']:,} blocks cleared"
    if found["num_kept"]:
        text += f", {found['num_kept']:,} kept until their leases end (lent or being written)"
    elif not found["can_list"]:
        text += "; it can't list its keys: what this daemon does not remember is left"
    elif not found["is_whole"]:
        text += "; others write to it meanwhile: some may be left"
    return text
