"""The fault table: each fault against each tier, through all that a daemon puts before a medium.

Of every cell three things are asked. No wrong byte: ``Chain.read`` fails the test at the first. No
call beyond its deadline: a daemon's queue says of itself whether one ever was. And recovery: the
same tier, opened once, keeps and serves everything again when the fault is over.

The servers are real, and so is what breaks them wherever that can be done: ``SHIMS`` names the
cells in which it can't, and docs/failure-modes.md shows the table. Faults under a whole daemon
are in test_movement.py and test_disk_daemon.py.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.fault.media import S3_ENVIRONMENT
from tests.fault.places import SHIMS, Place
from tests.fault.server_places import STORE_BYTES, Servers, opened_place
from tests.fault.table import (
    BACK_TIMEOUT_S,
    DAMAGE,
    NUMBERS,
    OUTAGES,
    TIERS,
    Chain,
    Fault,
    closing,
    open_chain,
)
from tests.servers.hosts import three_hosts
from tests.servers.mooncake import MooncakeStore
from tests.servers.seaweed import SeaweedServer
from tests.servers.valkey import ValkeyServer
from tests.waiting import until

pytestmark = pytest.mark.allow_hosts(["127.0.0.1", "192.0.2.3"])

DOCUMENT = Path(__file__).parents[2] / "docs" / "failure-modes.md"
LOCAL = ("memory", "disk")
"""Tiers whose calls have no time limit of their own: only the queue's, which leaves them alone."""
NEEDS_ROOT = {
    ("disk", Fault.NO_ROOM),
    ("disk", Fault.IO_ERROR),
    ("mooncake", Fault.SLOW),
    ("mooncake", Fault.CUT),
}
"""Cells that mount something, or make hosts."""
TURNS = 2


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """All servers, which every cell leaves well."""
    with contextlib.ExitStack() as stack:
        valkey, seaweed = ValkeyServer().run(), SeaweedServer()
        stack.callback(valkey.stop)
        stack.callback(seaweed.stop)
        seaweed.run()
        mooncake = MooncakeStore(STORE_BYTES)
        stack.callback(mooncake.stop)
        mooncake.start_master()
        mooncake.start_storage()
        far_mooncake = near = None
        if os.geteuid() == 0:
            near, _, third = stack.enter_context(three_hosts())
            far_mooncake = MooncakeStore(STORE_BYTES, third.address, third.within)
            stack.callback(far_mooncake.stop)
            with third.entered():
                far_mooncake.start_master()
            far_mooncake.start_storage()
        yield Servers(valkey, seaweed, mooncake, far_mooncake, near)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


# --- Values ---------------------------------------------------------------------------------------

SEALED_REASON = "sealed_not_authentic"


@pytest.mark.parametrize("kind", TIERS)
@pytest.mark.parametrize(
    ("fault", "is_sealed"),
    [*((fault, False) for fault in DAMAGE), (Fault.WRONG_TENANT, True)],
    ids=[*(fault.value for fault in DAMAGE), "wrong tenant, encrypted"],
)
async def test_a_damaged_value_is_a_miss(
    kind: str, fault: Fault, is_sealed: bool, tmp_path: Path, servers: Servers
) -> None:
    """It is counted by its reason, its neighbors are right, and written again it is served."""
    with opened_place(kind, fault, tmp_path, servers) as place:
        settings = place.settings
        if is_sealed:
            settings = msgspec.structs.replace(settings, key_files=[key_file(tmp_path)])
        async with closing(open_chain(settings, place.medium)) as chain:
            await chain.recover()
            await until(lambda: is_kept_for_another(chain), timeout_s=BACK_TIMEOUT_S)
            before = chain.rejected()
            damaged = place.damage()
            found = await chain.read(NUMBERS)
            reason = SEALED_REASON if is_sealed and kind != "disk" else place.reasons[fault]

            assert found == [number for number in NUMBERS if number not in damaged]
            assert gained(before, chain.rejected()) == {reason: len(damaged)}
            assert not chain.was_late
            await chain.recover()


def key_file(folder: Path) -> str:
    """A master key; each tenant has one of its own that is made of it."""
    path = folder / "key"
    path.write_bytes(b"k" * 32)
    path.chmod(0o600)
    return str(path)


async def is_kept_for_another(chain: Chain) -> bool:
    """Whether another tenant's values are there, under the same hashes."""
    return all(await chain.attempt(chain.write(NUMBERS, tenant=2)) or [False])


def gained(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What was counted meanwhile."""
    return {
        reason: number - before.get(reason, 0)
        for reason, number in after.items()
        if number > before.get(reason, 0)
    }


# --- Tiers ----------------------------------------------------------------------------------------

OUTAGE_CELLS = [
    pytest.param(
        kind,
        fault,
        id=f"{fault.value}-{kind}",
        marks=[pytest.mark.root] if (kind, fault) in NEEDS_ROOT else [],
    )
    for kind in TIERS
    for fault in OUTAGES
]


@pytest.mark.parametrize(("kind", "fault"), OUTAGE_CELLS)
async def test_a_broken_tier_costs_no_answer(
    kind: str, fault: Fault, tmp_path: Path, servers: Servers
) -> None:
    """Declined, a miss, or not available, within the deadline; all is well when it is over."""
    with opened_place(kind, fault, tmp_path, servers) as place:
        async with closing(open_chain(place.settings, place.medium)) as chain:
            await chain.recover()
            async with place.broken(chain):
                was_felt = [await use_while_broken(chain, place, fault, t) for t in range(TURNS)]
            await chain.end_what_hangs()

            assert any(was_felt) or fault is Fault.SLOW
            assert not chain.was_late or (kind in LOCAL and fault in (Fault.FROZEN, Fault.SLOW))
            # More than a full disk holds: it grows again, too.
            await chain.recover(range(3 * len(NUMBERS)))


async def use_while_broken(chain: Chain, place: Place, fault: Fault, turn: int) -> bool:
    """Write others and read what was kept; returns whether the fault made a difference."""
    first = 1000 * (turn + 1)
    kept = await chain.attempt(chain.write(range(first, first + place.num_others)))
    found = await chain.attempt(chain.read(NUMBERS))
    do_reads_go_on = fault is Fault.READ_ONLY or (fault is Fault.NO_ROOM and not place.evicts)
    assert found == list(NUMBERS) or not do_reads_go_on
    return kept is None or not all(kept) or found != list(NUMBERS)


# --- The document ---------------------------------------------------------------------------------


def test_the_document_shows_this_table() -> None:
    """Its rows are the faults, its columns the tiers, and it names every shim."""
    table = re.search(r"^\| fault \| memory .*?\n\n", DOCUMENT.read_text(), flags=re.M | re.S)
    assert table is not None
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table[0].strip().splitlines()
    )

    assert head[1 : 1 + len(TIERS)] == TIERS
    assert [row[0] for row in rows] == [fault.value for fault in Fault]
    for fault, row in zip(Fault, rows, strict=True):
        for kind, cell in zip(TIERS, row[1:], strict=False):
            assert ("(shim)" in cell) == (fault in SHIMS.get(kind, {})), (fault, kind)
