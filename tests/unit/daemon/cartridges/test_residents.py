"""Cartridges in a pool: absent, loaded, in use or pinned, and evicted only where that is right."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.node import NO_LEASE
from kvkeep.daemon.cartridges.residents import Resident, Residents
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, RefusedError
from kvkeep.model.ids import BlockHash, Holder, LeaseId, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.tiers.shared_memory import PoolFile

LAYOUT = KvLayout(2, 2, 512, 16, "bfloat16", "test")
NAMESPACE = Namespace(b"n" * 32)
ME = Holder(1, os.getpid())
FAR_S = 1e12


def names(start: int, count: int) -> list[BlockHash]:
    """Hashes of blocks."""
    return [BlockHash(number.to_bytes(32, "big")) for number in range(start, start + count)]


@pytest.fixture
async def shell(tmp_path: Path) -> AsyncIterator[Shell]:
    """A shell with a pool of some dozens of slots."""
    made = Shell(PoolFile.open(tmp_path / "pool", 3 << 20), SystemClock())
    made.open_layout(LAYOUT)
    yield made
    made.close()


@pytest.fixture
def residents(shell: Shell) -> Residents:
    """Of this pool."""
    return Residents(shell)


def store(shell: Shell, hashes: list[BlockHash]) -> int:
    """Have blocks stored; how many were taken."""
    reply = shell.handle(on.StoreAsked(0, ME, NAMESPACE, 0, hashes, 3, FAR_S))
    assert isinstance(reply, do.ReplyStore)
    if reply.lease_id == NO_LEASE:
        return 0
    granted = [slot for slot in reply.slots if slot != do.NO_SLOT]
    shell.handle(on.StoreFinished(0, ME, reply.lease_id, [True] * len(granted)))
    return len(granted)


def acquire(shell: Shell, hashes: list[BlockHash]) -> tuple[LeaseId, int]:
    """Lease blocks as an engine does."""
    reply = shell.handle(on.ReadAsked(0, ME, NAMESPACE, 0, hashes, FAR_S))
    assert isinstance(reply, do.ReplyRead)
    return reply.lease_id, len(reply.slots)


def told(hashes: list[BlockHash], cartridge_id: str = "ships") -> Resident:
    """What an engine says."""
    return Resident(cartridge_id, "d" * 64, NAMESPACE, 0, hashes)


def state(residents: Residents) -> object:
    """Of the only cartridge."""
    (found,) = residents.describe()
    return found["state"]


def num_slots(shell: Shell) -> int:
    """Of the pool."""
    assert shell.node is not None
    return len(shell.node.ledger.slots)


async def test_its_states(shell: Shell, residents: Residents) -> None:
    """From absent through loaded and in use to pinned, with an exact account of its memory."""
    hashes = names(0, 4)
    residents.keep(told(hashes), is_pinned=False)
    assert state(residents) == "absent"
    store(shell, hashes)
    assert state(residents) == "loaded"
    lease, _ = acquire(shell, hashes)
    assert state(residents) == "in use"
    residents.keep(told(hashes), is_pinned=True)
    assert state(residents) == "in use"
    shell.handle(on.ReadFinished(ME, [lease]))
    assert state(residents) == "pinned"
    (found,) = residents.describe()
    assert found["blocks_resident"] == 4
    assert found["bytes_resident"] == 4 * LAYOUT.block_bytes
    residents.keep(told(hashes), is_pinned=False)
    assert state(residents) == "loaded"


async def test_a_lease_given_back_twice_takes_no_pin_away(
    shell: Shell, residents: Residents
) -> None:
    """References are counted by lease: one that is over counts for nothing any more."""
    hashes = names(0, 2)
    store(shell, hashes)
    residents.keep(told(hashes), is_pinned=True)
    lease, _ = acquire(shell, hashes)
    for _ in range(3):
        shell.handle(on.ReadFinished(ME, [lease]))

    assert state(residents) == "pinned"
    assert shell.node is not None
    shell.node.check()


async def test_a_pinned_one_stays_when_room_is_made(shell: Shell, residents: Residents) -> None:
    """Blocks that nobody reads go before it, and it does not go at all."""
    pinned, loaded = names(0, 4), names(100, 4)
    store(shell, pinned)
    store(shell, loaded)
    residents.keep(told(pinned), is_pinned=True)
    residents.keep(told(loaded, "trains"), is_pinned=False)

    for start in range(1000, 1000 + 2 * num_slots(shell)):
        store(shell, names(start, 1))

    ships, trains = residents.describe()
    assert (ships["state"], ships["blocks_resident"]) == ("pinned", 4)
    assert (trains["state"], trains["blocks_resident"]) == ("absent", 0)


async def test_pins_leave_half_of_the_pool(shell: Shell, residents: Residents) -> None:
    """A pin beyond that is refused; the blocks are there all the same."""
    hashes = names(0, num_slots(shell) // 2 + 1)
    store(shell, hashes)

    residents.keep(told(hashes), is_pinned=True)

    assert state(residents) == "loaded"
    assert residents.num_pins_refused == 1


async def test_half_a_cartridge_is_not_pinned(shell: Shell, residents: Residents) -> None:
    """Blocks that are of no use alone keep nobody out."""
    hashes = names(0, 4)
    store(shell, hashes[:2])

    residents.keep(told(hashes), is_pinned=True)

    assert state(residents) == "absent"
    assert shell.node is not None
    assert len(shell.node.reads) == 0


@pytest.mark.parametrize("what", ["in use", "pinned"])
async def test_what_is_used_or_pinned_is_not_dropped(
    shell: Shell, residents: Residents, what: str
) -> None:
    """But by force; who reads it reads on, and its slots are free when that is over."""
    hashes = names(0, 4)
    store(shell, hashes)
    residents.keep(told(hashes), is_pinned=what == "pinned")
    lease, _ = acquire(shell, hashes) if what == "in use" else (None, 0)

    with pytest.raises(RefusedError, match=what):
        residents.drop("ships")
    assert state(residents) == what

    assert residents.drop("ships", is_forced=True) == 4
    assert residents.describe() == []
    assert acquire(shell, hashes)[1] == 0
    if lease is not None:
        shell.handle(on.ReadFinished(ME, [lease]))
    assert shell.node is not None
    assert shell.node.ledger.num_free == num_slots(shell)
    shell.node.check()


async def test_a_loaded_one_is_dropped(shell: Shell, residents: Residents) -> None:
    """Once; after that nobody knows it."""
    hashes = names(0, 3)
    store(shell, hashes)
    residents.keep(told(hashes), is_pinned=False)

    assert residents.drop("ships") == 3
    with pytest.raises(InputError, match="no engine has brought"):
        residents.drop("ships")


async def test_a_cleared_pool_keeps_nothing(shell: Shell, residents: Residents) -> None:
    """Pins end with the blocks they are on."""
    hashes = names(0, 4)
    store(shell, hashes)
    residents.keep(told(hashes), is_pinned=True)
    shell.handle(on.ClearAsked(0))

    residents.cleared()

    assert residents.describe() == []
    assert shell.node is not None
    assert shell.node.ledger.num_free == num_slots(shell)
