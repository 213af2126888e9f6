"""A pool in a folder and a tier in memory behind a real queue, without a daemon around them."""

import asyncio
import gc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.admission import AdmissionPolicy, AdmissionSettings
from kvkeep.core.blocks import BlockState
from kvkeep.core.node import NodeState
from kvkeep.core.planner import PlanMode, PlannerSettings
from kvkeep.daemon.movement.cascade import Cascade
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.movement.pace import Pace
from kvkeep.daemon.movement.promotion import Promotion, Wanted
from kvkeep.daemon.movement.slots import parts_of, value_bytes
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import SystemClock
from kvkeep.model.ids import BlockHash, BlockKey, Holder, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.tiers.base import BATCH_MAX
from kvkeep.tiers.faulty import FaultyTier
from kvkeep.tiers.io_queue import QueueLimits, TierQueue
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.shared_memory import PoolFile
from kvkeep.tiers.slot_header import DIGEST_BYTES
from kvkeep.transfer.host_copy import open_copier

LAYOUT = KvLayout(2, 2, 512, 16, "bfloat16", "test")
POOL_BYTES = 3 << 20
NAMESPACE = Namespace(b"n" * 32)
CAPACITY_BYTES = 64 << 20
WAIT_S = 60.0
"""Far more than anything here takes."""
ENGINE = Holder(7, 1 << 21)
"""Of a process that can't exist."""


def hashes(first: int, count: int) -> list[BlockHash]:
    """Hashes of a sequence."""
    return [BlockHash(number.to_bytes(8, "little") * 4) for number in range(first, first + count)]


def keys(first: int, count: int) -> list[BlockKey]:
    """Keys of a sequence."""
    return [BlockKey(NAMESPACE, block_hash) for block_hash in hashes(first, count)]


def wanted(first: int, count: int) -> Wanted:
    """What a request for a sequence asks."""
    return Wanted(NAMESPACE, 0, hashes(first, count), 0.0)


def payload(key: BlockKey) -> bytes:
    """What a block holds: it follows from its key."""
    seed = int.from_bytes(key.block_hash[:8], "little")
    return np.random.default_rng(seed).bytes(LAYOUT.block_bytes)


class Grounds:
    """Everything that movers need; made inside a running loop."""

    def __init__(
        self,
        folder: Path,
        *,
        limits: QueueLimits | None = None,
        mode: PlanMode = PlanMode.LOAD,
        probes_at_once: int = BATCH_MAX,
    ) -> None:
        clock = SystemClock()
        self.shell = Shell(PoolFile.open(folder / "pool", POOL_BYTES), clock)
        self.shell.open_layout(LAYOUT)
        self.view = self.shell.pool.view()
        self.value_bytes = value_bytes(self.view)
        self.medium = FaultyTier(MemoryTier(CAPACITY_BYTES), {}, seed=3)
        self.queue = TierQueue(self.medium, limits, clock)
        self.tier = self._lower_tier(self.queue, probes_at_once)
        self.counts: Counter[str] = Counter()
        self.pace = Pace(PlannerSettings(mode=mode), LAYOUT, clock)
        self.cascade = Cascade(self.shell, [self.tier], self.view, self._count)
        self.promotion = Promotion(
            self.shell, [self.tier], self.view, self.pace, clock, self._count
        )

    def _count(self, name: str, amount: int) -> None:
        self.counts[name] += amount

    def _lower_tier(self, queue: TierQueue, probes_at_once: int = BATCH_MAX) -> LowerTier:
        return LowerTier(
            queue,
            AdmissionPolicy(AdmissionSettings(CAPACITY_BYTES)),
            SystemClock(),
            value_bytes=self.value_bytes,
            is_local=False,
            probes_at_once=probes_at_once,
        )

    def another_tier(self, name: str) -> LowerTier:
        """One more, that whoever takes it closes."""
        medium = MemoryTier(CAPACITY_BYTES)
        medium.name = name
        return self._lower_tier(TierQueue(medium, None, SystemClock()))

    @property
    def node(self) -> NodeState:
        """The core."""
        assert self.shell.node is not None
        return self.shell.node

    def close(self) -> None:
        """Let everything go that hangs; no lease and no slot may be left."""
        self.medium.release()
        assert self.queue.close(WAIT_S) == []
        shell = self.shell
        # The file is closed with the last view of it.
        self.__dict__.clear()
        shell.close()
        gc.collect()

    # ---- the pool

    def reserve(self, blocks: Sequence[BlockKey]) -> do.ReplyStore:
        """Lend slots to an engine."""
        reply = self.shell.handle(
            on.StoreAsked(0, ENGINE, NAMESPACE, 0, [k.block_hash for k in blocks], 3, 1e12)
        )
        assert isinstance(reply, do.ReplyStore)
        return reply

    def store(self, blocks: Sequence[BlockKey]) -> None:
        """Make blocks readable, as an engine does."""
        reply = self.reserve(blocks)
        slots = np.array(reply.slots, dtype=np.int64)
        memory = np.frombuffer(b"".join(payload(key) for key in blocks), dtype=np.uint8)
        starts = np.arange(0, memory.size, LAYOUT.page_bytes, dtype=np.uint64)
        source = starts + np.uint64(memory.ctypes.data)
        target = self.view.page_addresses(slots, 0, LAYOUT.num_heads).reshape(-1)
        digests = np.empty((len(source), DIGEST_BYTES), dtype=np.uint8)
        open_copier().store(source, target, LAYOUT.page_bytes, digests)
        self.view.digests[slots] = digests.reshape(len(blocks), 2, 2, DIGEST_BYTES)
        self.shell.handle(on.StoreFinished(0, ENGINE, reply.lease_id, [True] * len(blocks)))

    def clear(self) -> None:
        """Forget every block of the pool."""
        self.shell.handle(on.ClearAsked(0))

    def num_right(self, blocks: Sequence[BlockKey]) -> int:
        """Readable blocks; one with other bytes than its key says is a failure of the test."""
        found = [self.node.ledger.find(key) for key in blocks]
        ready = [
            (key, slot)
            for key, slot in zip(blocks, found, strict=True)
            if slot is not None and slot.state is BlockState.READY
        ]
        for key, slot in ready:
            assert bytes(self.view.payload(slot.idx)) == payload(key)
        return len(ready)

    def assert_quiet(self) -> None:
        """No lease runs, no slot is being filled or waits for somebody."""
        self.node.check()
        states = self.node.ledger.num_by_state
        assert (len(self.node.reads), len(self.node.writes)) == (0, 0)
        assert states[BlockState.WRITING] == states[BlockState.FENCED] == 0
        assert states[BlockState.DOOMED] == 0

    # ---- the tier

    def keep(self, blocks: Sequence[BlockKey]) -> None:
        """Have blocks in the tier and nowhere else."""
        self.store(blocks)
        slots = [self.node.ledger.find(key) for key in blocks]
        values = [parts_of(self.view, slot.idx) for slot in slots if slot is not None]
        assert all(self.medium.write(blocks, values))
        self.clear()

    def kept(self, blocks: Sequence[BlockKey]) -> int:
        """How many of these the tier has, each with the right bytes behind its digests."""
        num_kept = 0
        for key in blocks:
            room = bytearray(self.value_bytes)
            (length,) = self.medium.read([key], [[memoryview(room)]])
            if length is not None:
                assert length == self.value_bytes
                assert bytes(room[-LAYOUT.block_bytes :]) == payload(key)
                num_kept += 1
        return num_kept

    async def drained(self) -> None:
        """Wait until neither mover has anything in motion."""
        while self.cascade._running or self.promotion._reading:
            await asyncio.wait([*self.cascade._running, *self.promotion._reading], timeout=WAIT_S)

    async def hanging(self) -> None:
        """Wait until a call hangs."""
        assert await asyncio.to_thread(self.medium.reached.wait, WAIT_S)
