"""``kvkeep top``: what a router and daemons do now, and what they did since their start."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvkeep.cli.status import readable_bytes
from kvkeep.cli.target import find_folder
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.record import StackRecord, require_ready

TIMEOUT_S = 5.0
"""For one answer: whoever is not frozen answers within milliseconds."""
INTERVAL_S_MIN = 0.1
WIDTH_IN_FILES = 160
"""Columns where there is no terminal: a name that is cut can't be used."""
MOVES = {
    "requests_done": "requests",
    "requests_failed": "failed",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "completion_tokens": "made",
    "response_bytes": "bytes",
}
"""Counter of an endpoint, and its column."""
Page = dict[str, Any]


@click.command()
@click.argument("stack", required=False)
@click.option("--router", "router_url", help="Admin address of a router: see what it prints.")
@click.option("--daemon", "daemon_urls", multiple=True, help="Metrics address of a daemon.")
@click.option("--admin-key-file", type=click.Path(path_type=Path), help="The router's admin key.")
@click.option("--interval-s", default=1.0, show_default=True, help="Between two looks.")
@click.option("--once", is_flag=True, help="Look once and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: print one JSON line.")
def top(
    stack: str | None,
    router_url: str | None,
    daemon_urls: tuple[str, ...],
    admin_key_file: Path | None,
    interval_s: float,
    once: bool,
    as_json: bool,
) -> None:
    """Show requests, tokens, hits of each tier, bytes and what is in flight, as it changes.

    With STACK, a name or a stack file, of its router and its daemon. Without, of those named:
    kvkeep top --router http://127.0.0.1:8081 --daemon http://127.0.0.1:9100
    """
    if stack is not None:
        if router_url is not None or daemon_urls:
            raise InputError("name a stack, or addresses: not both")
        router_url, daemon_urls = _addresses(require_ready(find_folder(stack, None)))
    if router_url is None and not daemon_urls:
        raise InputError("name what to look at: a stack, --router URL, --daemon URL")
    if as_json and not once:
        raise InputError("--json shows one moment: add --once")
    if not interval_s >= INTERVAL_S_MIN:
        raise InputError(f"--interval-s {interval_s:g} is too short: at least {INTERVAL_S_MIN}")
    headers = _headers(admin_key_file)
    if not once and not sys.stdout.isatty():
        raise InputError("this is no terminal: add --once")
    with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
        look = _looking(client, router_url, daemon_urls, headers)
        if once:
            found = look()
            if as_json:
                click.echo(json.dumps(found))
            else:
                console = Console()
                wide = console if console.is_terminal else Console(width=WIDTH_IN_FILES)
                wide.print(render(found, None, 0.0))
        else:
            with contextlib.suppress(KeyboardInterrupt):
                _watch(look, interval_s)


def _addresses(record: StackRecord) -> tuple[str | None, tuple[str, ...]]:
    """Of a stack's router and its daemon, as far as it has them."""
    router = None if record.router is None else record.router.admin_url
    return router, () if record.daemon is None else (record.daemon.metrics_url,)


def _headers(key_file: Path | None) -> dict[str, str]:
    if key_file is None:
        return {}
    try:
        return {"Authorization": f"Bearer {key_file.read_text().strip()}"}
    except (OSError, ValueError) as error:
        raise InputError(f"{key_file} can't be read: name the router's admin key file") from error


def _looking(
    client: httpx.Client,
    router_url: str | None,
    daemon_urls: tuple[str, ...],
    headers: Mapping[str, str],
) -> Callable[[], Page]:
    def look() -> Page:
        router = None
        if router_url is not None:
            router = _ask(client, f"{router_url.rstrip('/')}/workers", headers, "router", "workers")
        daemons = {
            url: _ask(client, f"{url.rstrip('/')}/status", {}, "daemon", "counters")
            for url in daemon_urls
        }
        return {"router": router, "daemons": daemons, "hits": hits(router, daemons)}

    return look


def _ask(client: httpx.Client, url: str, headers: Mapping[str, str], what: str, field: str) -> Page:
    try:
        found = client.get(url, headers=dict(headers)).raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UnavailableError(f"no {what} answers at {url} ({error})") from error
    if not isinstance(found, dict) or field not in found:
        raise UnavailableError(f"{url} is no {what} of kvkeep: see what it prints at its start")
    return found


def hits(router: Page | None, daemons: Mapping[str, Page]) -> dict[str, int]:
    """What was found in each place.

    ``engine_tokens`` are prompt tokens that engines reported as not computed, wherever they came
    from; ``pool_blocks`` were loaded by engines from the daemons' pools; and what stands under a
    tier's name was read from it into a pool, in values, one or more for a block.
    """
    found = {
        "engine_tokens": 0 if router is None else router["total"]["cached_tokens"],
        "pool_blocks": sum(each["counters"].get("blocks_loaded", 0) for each in daemons.values()),
    }
    for daemon in daemons.values():
        for tier in (daemon.get("movement") or {}).get("tiers", ()):
            reads = tier.get("reads") or {}
            found[tier["name"]] = found.get(tier["name"], 0) + reads.get("num_done", 0)
    return found


def _watch(look: Callable[[], Page], interval_s: float) -> None:
    """Show until interrupted; who does not answer is shown as away, and looked at again."""
    clock = SystemClock()
    before: Page | None = None
    before_s = clock.now_s()
    with Live(Text("..."), refresh_per_second=4, screen=True) as live:
        while True:
            try:
                found, now_s = look(), clock.now_s()
                live.update(render(found, before, now_s - before_s))
                before, before_s = found, now_s
            except UnavailableError as error:
                live.update(Text(str(error), style="red"))
            time.sleep(interval_s)


def render(found: Page, before: Page | None, passed_s: float) -> RenderableType:
    """One screen: totals, or what changes each second where there is an earlier look."""
    parts: list[RenderableType] = []
    if found["router"] is not None:
        earlier = None if before is None else before["router"]
        parts += [_summary(found["router"]), _workers(found["router"], earlier, passed_s)]
        if found["router"].get("handoff") is not None:
            parts.append(_handoff(found["router"]["handoff"]))
        parts += [_on_demand(each) for each in found["router"].get("on_demand", ())]
    for url, daemon in found["daemons"].items():
        parts.append(_daemon(url, daemon))
    parts.append(Text("hits  " + "  ".join(f"{name} {n:,}" for name, n in found["hits"].items())))
    return Group(*parts)


def _summary(router: Page) -> Text:
    gauges, total = router["gauges"], router["total"]
    refused = sum(router["refused"].values())
    return Text(
        f"router  {router['policy']}, {gauges['requests_running']:.0f} running, "
        f"{gauges['requests_waiting']:.0f} waiting, {total['requests_done']:,} done, "
        f"{total['requests_failed']:,} failed, {refused:,} refused, "
        f"{router['counters']['retries']:,} retried, up {gauges['uptime_s']:.0f} s"
    )


def _workers(router: Page, before: Page | None, passed_s: float) -> Table:
    table = Table(box=None, pad_edge=False)
    per_s = "" if before is None or passed_s <= 0 else "/s"
    for title in ("engine", "state", "in flight", "ttft"):
        is_text = title in ("engine", "state")
        table.add_column(title, justify="left" if is_text else "right", overflow="fold")
    for title in MOVES.values():
        table.add_column(f"{title}{per_s}", justify="right")
    earlier = {} if before is None else {each["name"]: each for each in before["workers"]}
    for worker in router["workers"]:
        was = earlier.get(worker["name"], {}) if per_s else {}
        moves = [(worker[name] - was.get(name, 0)) / (passed_s if per_s else 1) for name in MOVES]
        table.add_row(
            worker["name"],
            worker["state"] if worker["role"] == "serve" else f"{worker['state']} {worker['role']}",
            str(worker["in_flight"]),
            f"{worker['ttft_s'] * 1000:.0f} ms",
            *(f"{value:,.0f}" for value in moves[:-1]),
            readable_bytes(int(moves[-1])),
        )
    return table


def _handoff(handoff: Page) -> Text:
    """How hand-offs ended, and why others were none; zeros are left out."""
    counts = {
        **handoff["outcomes"],
        **{f"skipped as {reason}": count for reason, count in handoff["skips"].items()},
        **{f"after {label}": count for label, count in handoff["fallbacks"].items()},
    }
    told = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n)
    return Text(f"hand-offs  {handoff['transport']}: {told or 'none yet'}")


def _on_demand(engine: Page) -> Text:
    doing = f" ({engine['doing']})" if engine["doing"] else ""
    models = ", ".join(engine["models"])
    return Text(
        f"on demand  {engine['name']}, for {models}: {engine['state']}{doing}, "
        f"{engine['waiting']} waiting"
    )


def _daemon(url: str, daemon: Page) -> Text:
    counters, gauges = daemon["counters"], daemon["gauges"]
    return Text(
        f"daemon  {url}  {gauges['slots_ready']:,.0f} of {gauges['slots']:,.0f} blocks, "
        f"{counters['blocks_loaded']:,} loaded ({readable_bytes(counters['bytes_loaded'])}), "
        f"{counters['blocks_promoted']:,} from lower tiers, "
        f"{counters['blocks_stored']:,} stored ({readable_bytes(counters['bytes_stored'])})"
    )
