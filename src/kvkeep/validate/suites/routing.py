"""How a router spreads keys: always to the same engine, evenly, and moving few when one leaves.

The router is asked how it would choose (``POST /explain``); nothing is sent to engines, and no load
bends its choice.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

from kvkeep.validate.load import Endpoint
from kvkeep.validate.settings import Document
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.needs import ROUTER_ADMIN

NAME = "routing"
NUM_KEYS = {"small": 5000, "full": 20_000}
"""Fewer scatter too far: with 2,000 over 8 engines, one even ring in a hundred fails the bound."""

KEY_HEADER = "X-Kvkeep-Key"
IN_FLIGHT = 16
SHARE_MAX = 0.7
EVENNESS_MAX = 1.25
"""Most keys of an engine over the mean."""
MOVED_SLACK = 0.02
"""Of all keys: requests that other clients have under way may bend a choice."""


async def run(context: Context) -> list[SuiteReport]:
    """One report."""
    report = context.new_report(NAME, "by key", 1)
    report.judges_answers = False
    report.data = "numbered keys"
    admin = context.subject.admin
    assert admin is not None
    workers = await _ready_workers(admin)
    if len(workers) < 2:
        detail = f"{len(workers)} engine(s) behind the router; two are needed to choose between"
        report.check("several engines", False, detail, gate=True)
        return [report]
    keys = [f"key-{context.settings.seed}-{i}" for i in range(NUM_KEYS[context.settings.scale])]
    first = await _homes(context, report, keys, "first pass")
    if not first:
        return [report]
    second = await _homes(context, report, keys, "second pass")
    changed = [key for key in keys if first[key] != second[key]]
    report.check("same key, same engine", not changed, f"{len(changed)} of {len(keys)} keys moved")
    _check_spread(report, first, workers)
    await _check_leaving(context, report, first, workers)
    return [report]


async def _ready_workers(admin: Endpoint) -> list[str]:
    listed = await admin.get_json("/workers")
    rows = listed if isinstance(listed, list) else listed.get("workers", [])
    return sorted(str(row["name"]) for row in rows if row.get("state") in (None, "ready"))


async def _homes(
    context: Context, report: SuiteReport, keys: Sequence[str], phase: str
) -> dict[str, str]:
    """Which engine each key goes to; empty where the router does not go by keys."""
    admin = context.subject.admin
    assert admin is not None
    model = context.subject.engine.model
    homes: dict[str, str] = {}
    upcoming = iter(keys)
    defects: list[str] = []

    async def ask_on() -> None:
        for key in upcoming:
            body = {"model": model, "messages": [{"role": "user", "content": "Hi."}]}
            got = await admin.post_json("/explain", body, {KEY_HEADER: key})
            said = got.json() if got.status_code == 200 else {}
            if got.status_code != 200 or said.get("endpoint") is None:
                defects.append(f"HTTP {got.status_code}: {got.text[:200]}")
                return
            homes[key] = str(said["endpoint"])
            if said.get("key") != key or "no key" in str(said.get("reason")):
                defects.append(f"policy {said.get('policy')} does not go by keys")
                return
            if len(homes) % 100 == 0 or len(homes) == len(keys):
                context.progress(phase, len(homes), len(keys))

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(ask_on())
    if defects:
        report.check("router goes by keys", False, defects[0], gate=True)
        return {}
    return homes


def _check_spread(report: SuiteReport, homes: Mapping[str, str], workers: Sequence[str]) -> None:
    counts = Counter(homes.values())
    idle = [name for name in workers if not counts[name]]
    most = max(counts.values())
    evenness = most * len(workers) / len(homes)
    report.numbers |= {"keys": len(homes), "max_over_mean": evenness}
    report.numbers |= {f"keys_{name}": counts[name] for name in workers}
    report.check("every engine is used", not idle, f"idle: {', '.join(idle) or 'none'}")
    report.check(
        "no engine has most keys",
        most <= SHARE_MAX * len(homes),
        f"{most / len(homes):.0%} of the keys; {SHARE_MAX:.0%} allowed",
    )
    report.check(
        "keys are spread evenly",
        evenness <= EVENNESS_MAX,
        f"the most are {evenness:.3f} times the mean; {EVENNESS_MAX} allowed",
    )


async def _check_leaving(
    context: Context, report: SuiteReport, before: Mapping[str, str], workers: Sequence[str]
) -> None:
    """One engine drains and comes back: only its keys move, and they come back, too."""
    admin = context.subject.admin
    assert admin is not None
    leaver = workers[-1]
    path = f"/workers/{leaver}"
    try:
        drained = await admin.post_json(path, {"drain": True}, method="PATCH")
        if drained.status_code != 200:
            report.check("one leaves", None, f"HTTP {drained.status_code}: {drained.text[:200]}")
            return
        without = await _homes(context, report, list(before), "one engine fewer")
    finally:
        await admin.post_json(path, {"drain": False}, method="PATCH")
    again = await _homes(context, report, list(before), "back again")
    if not without or not again:
        return
    strayed = [key for key, home in before.items() if home not in (leaver, without[key])]
    kept = [key for key, home in without.items() if home == leaver]
    allowed = MOVED_SLACK * len(before)
    report.numbers |= {"moved_keys": len([k for k in before if before[k] != without[k]])}
    report.check("a leaver gets no keys", not kept, f"{len(kept)} keys still go to {leaver}")
    report.check(
        "only a leaver's keys move", len(strayed) <= allowed, f"{len(strayed)} others moved"
    )
    moved = [key for key, home in before.items() if again[key] != home]
    report.check("keys come back", len(moved) <= allowed, f"{len(moved)} are elsewhere now")


SUITE = Suite(
    name=NAME,
    title="Asks a router where keys go: twice, and with one engine fewer.",
    proves="A key has one home, homes are spread evenly, and only a leaver's keys move.",
    document=Document.DISTRIBUTED,
    run=run,
    groups=("quick",),
    aliases=("test_routing_distribution",),
    needs=(ROUTER_ADMIN,),
    needs_router=True,
    small_s=30.0,
)
