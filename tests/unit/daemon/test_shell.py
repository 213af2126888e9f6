"""The shell around the core, with a pool in a folder and no sockets."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.daemon.metrics import Metrics
from kvkeep.daemon.recovery import recover
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, InvariantError, RefusedError
from kvkeep.model.ids import UNKNOWN_PID, BlockHash, Holder, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.model.tenant import tag_of
from kvkeep.tiers.shared_memory import WRITERS_MAX, PoolFile

LAYOUT = KvLayout(2, 2, 512, 16, "bfloat16", "test")
POOL_BYTES = 3 << 20
NAMESPACE = Namespace(b"n" * 32)
HASHES = [BlockHash(bytes([number]) * 32) for number in range(4)]
ME = Holder(1, os.getpid())
FAR_S = 1e12


@pytest.fixture
async def shell(tmp_path: Path) -> AsyncIterator[Shell]:
    """A shell with a formatted pool."""
    made = Shell(PoolFile.open(tmp_path / "pool", POOL_BYTES), SystemClock())
    made.open_layout(LAYOUT)
    yield made
    made.close()


def reserve(shell: Shell, holder: Holder = ME, head_mask: int = 3) -> do.ReplyStore:
    """Lend slots for the four blocks."""
    reply = shell.handle(on.StoreAsked(0, holder, NAMESPACE, 0, HASHES, head_mask, FAR_S))
    assert isinstance(reply, do.ReplyStore)
    return reply


def store(shell: Shell) -> None:
    """Have the four blocks stored, digests left at zero."""
    reply = reserve(shell)
    shell.handle(on.StoreFinished(0, ME, reply.lease_id, [True] * 4))


async def reopened(shell: Shell, find_intact: object = set) -> Shell:
    """What a daemon that comes later makes of the pool."""
    shell.close()
    again = Shell(PoolFile.open(shell.pool.path, POOL_BYTES), SystemClock())
    again.recover(find_intact)  # type: ignore[arg-type]
    return again


async def test_an_equal_layout_changes_nothing(shell: Shell) -> None:
    """The second engine's blocks go beside the first one's."""
    store(shell)
    shell.open_layout(KvLayout(2, 2, 512, 16, "bfloat16", "test"))

    assert shell.node is not None
    assert len(shell.node.ledger.ready_slots()) == 4


async def test_another_layout_is_refused_while_there_are_blocks_or_engines(shell: Shell) -> None:
    """Nobody's blocks are wiped by somebody's wrong setting; an unused pool is formatted anew."""
    other = KvLayout(2, 2, 512, 32, "bfloat16", "test")
    shell.num_workers = 1
    with pytest.raises(RefusedError, match="block_tokens 32, not 16"):
        shell.open_layout(other)
    shell.num_workers = 0
    store(shell)
    with pytest.raises(RefusedError, match="a daemon of its own"):
        shell.open_layout(other)
    shell.handle(on.ClearAsked(0))
    shell.open_layout(other)

    assert shell.pool.geometry is not None
    assert shell.pool.geometry.layout == other


async def test_a_layout_that_does_not_fit_changes_nothing(shell: Shell) -> None:
    """The pool keeps its format."""
    with pytest.raises(InputError, match="raise pool_bytes"):
        shell.open_layout(KvLayout(2, 2, 1 << 20, 16, "bfloat16", "test"))
    assert shell.pool.geometry is not None
    assert shell.pool.geometry.layout == LAYOUT


async def test_blocks_come_back_after_a_crash(shell: Shell) -> None:
    """Those whose bytes are right; the others are dropped and their slots free."""
    store(shell)
    again = await reopened(shell, lambda slots: set(slots[1:]))

    assert again.node is not None
    assert len(again.node.ledger.ready_slots()) == 3
    assert again.node.ledger.num_free == again.node.ledger.slots[-1].idx + 1 - 3
    again.close()


async def test_recovery_verifies_bytes(shell: Shell) -> None:
    """Digests of zeros fit no page."""
    store(shell)
    shell.close()
    pool = PoolFile.open(shell.pool.path, POOL_BYTES)
    again = Shell(pool, SystemClock())

    assert recover(again, pool, verify=True) == (0, 4)
    again.close()


@pytest.fixture
def other_pid() -> Iterator[int]:
    """A process that runs."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate(b"\n")


async def test_a_slot_of_several_writers_waits_for_all(shell: Shell, other_pid: int) -> None:
    """After a crash its header can't name them, but the pool lists who may be writing."""
    shell.add_writer(os.getpid())
    shell.add_writer(other_pid)
    reserve(shell, ME, 1)
    reserve(shell, Holder(2, other_pid), 2)
    again = await reopened(shell)
    assert again.node is not None
    num_free = again.node.ledger.num_free
    again.handle(on.HolderQuiet(os.getpid()))
    assert again.node.ledger.num_free == num_free
    again.handle(on.HolderQuiet(other_pid))
    assert again.node.ledger.num_free == num_free + 4
    again.close()


async def test_an_unknown_writer_keeps_its_slots_fenced(shell: Shell) -> None:
    """Where the kernel could not name the process, nothing proves that it is quiet."""
    shell.add_writer(UNKNOWN_PID)
    reserve(shell, Holder(1, UNKNOWN_PID))
    again = await reopened(shell)
    again.handle(on.HolderQuiet(UNKNOWN_PID))

    assert again.node is not None
    assert again.node.ledger.num_free == len(again.node.ledger.slots) - 4
    again.close()


async def test_the_list_of_writers_has_an_end_and_a_check(shell: Shell) -> None:
    """Too many, or a rotten list: then nobody is known."""
    shell.pool.note_writers(range(1, WRITERS_MAX + 1))
    assert shell.pool.find_writers() == list(range(1, WRITERS_MAX + 1))
    shell.pool.note_writers(range(1, WRITERS_MAX + 2))
    assert shell.pool.find_writers() == [0]
    shell.pool.note_writers([7, 8])
    shell.pool._mapping[2052] ^= 1
    assert shell.pool.find_writers() == [0]


async def test_a_failure_in_the_core_ends_all_lending(shell: Shell) -> None:
    """What contradicts itself is not asked again."""
    store(shell)
    with pytest.raises(InvariantError, match="event=StoreFinished"):
        shell.handle(on.StoreFinished(0, None, None, None))  # type: ignore[arg-type]

    assert shell.handle(on.ReadAsked(0, ME, NAMESPACE, 0, HASHES, FAR_S)) is None


async def test_a_fence_keeps_the_layout(shell: Shell, other_pid: int) -> None:
    """While a writer of an earlier daemon may go on, its places mean what they meant."""
    reserve(shell, Holder(7, other_pid))
    again = await reopened(shell)
    other = KvLayout(4, 2, 512, 16, "bfloat16", "test")

    with pytest.raises(RefusedError, match="a daemon of its own"):
        again.open_layout(other)
    again.close()


async def test_a_broken_shell_formats_nothing(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a defect the pool stays as it is for the daemon that comes next."""
    store(shell)
    assert shell.node is not None

    def fail(*_: object, **__: object) -> None:
        raise InvariantError("planted")

    monkeypatch.setattr(shell.node, "handle", fail)
    with pytest.raises(InvariantError):
        shell.handle(on.TimePassed())
    with pytest.raises(RefusedError, match="about to end"):
        shell.open_layout(LAYOUT)

    assert sum(1 for _, header in shell.pool.scan() if header is not None) == 4


async def test_quotas_hold_over_a_restart(tmp_path: Path) -> None:
    """Whose a recovered block is, its namespace says; the figures are shown by tenant."""
    mine = Namespace(bytes(24) + tag_of("mine"))
    shell = Shell(PoolFile.open(tmp_path / "pool", POOL_BYTES), SystemClock())
    shell.open_layout(LAYOUT)
    reply = shell.handle(on.StoreAsked(0, ME, mine, 0, HASHES, 3, FAR_S))
    assert isinstance(reply, do.ReplyStore)
    shell.handle(on.StoreFinished(0, ME, reply.lease_id, [True] * 4))
    store(shell)
    shell.close()
    again = Shell(
        PoolFile.open(shell.pool.path, POOL_BYTES), SystemClock(), quotas={"mine": 0.25, "x": 0.5}
    )
    again.recover(set)
    assert again.node is not None
    num_slots = len(again.node.ledger.slots)
    found = Metrics(again, SystemClock())

    assert found.tenants() == {
        "mine": {"tenant_blocks": 4, "tenant_quota_blocks": num_slots // 4},
        "x": {"tenant_blocks": 0, "tenant_quota_blocks": num_slots // 2},
        "others": {
            "tenant_blocks": 4,
            "tenant_quota_blocks": num_slots - num_slots // 4 - num_slots // 2,
        },
    }
    samples = [sample for family in found.collect() for sample in family.samples]
    assert [s.value for s in samples if s.labels == {"tenant": "mine"}] == [4.0, num_slots // 4]
    again.close()
