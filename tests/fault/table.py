"""The rows and columns of the fault table, and a tier as a daemon drives it."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from enum import Enum
from typing import Any, TypeVar

import pytest

from kvkeep.core.breaker import BreakerState
from kvkeep.daemon.movement import opening
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.tier_settings import AnyTierSettings
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.testing.tier_contract import block_key, value_bytes
from kvkeep.tiers.base import Tier
from tests.waiting import until

VALUE_BYTES = 100_000
NUMBERS = range(8)
"""What a cell keeps before the fault strikes, and wants back afterwards."""
BATCH_BYTES = len(NUMBERS) * VALUE_BYTES
TICK_S = 0.02
"""A daemon sweeps a few times a second; here a late call is to be seen as such."""
CLOSE_S = 60.0
BACK_TIMEOUT_S = 90.0
"""A tier is tried again every two seconds; a store that lost a member takes longest."""
CLOCK = SystemClock()

Answer = TypeVar("Answer")


class Fault(Enum):
    """What breaks; the value is its name in docs/failure-modes.md."""

    BIT_FLIP = "bit flip"
    TRUNCATION = "truncation"
    SWAPPED = "two blocks swapped"
    WRONG_TENANT = "wrong tenant"
    NO_ROOM = "ENOSPC"
    IO_ERROR = "EIO"
    READ_ONLY = "EROFS"
    KILLED = "server killed"
    FROZEN = "server frozen"
    SLOW = "slow by 10x"
    CUT = "network cut in mid-value"


DAMAGE = [Fault.BIT_FLIP, Fault.TRUNCATION, Fault.SWAPPED, Fault.WRONG_TENANT]
"""Faults of single values; the others are faults of a whole tier."""
OUTAGES = [fault for fault in Fault if fault not in DAMAGE]
TIERS = ["memory", "disk", "valkey", "object_store", "mooncake"]


@functools.cache
def value_of(number: int, tenant: int = 1) -> bytes:
    """What is kept under a number: different for each, and for each tenant."""
    return value_bytes(1000 * tenant + number, VALUE_BYTES)


def keys_of(numbers: Sequence[int], tenant: int = 1) -> list[BlockKey]:
    """Keys of a tenant, whose tag is in the namespace: the same hashes for each of them."""
    return [block_key(number, namespace=tenant) for number in numbers]


class Chain:
    """A tier behind its wrappers, its queue and its breaker, and who asks it."""

    def __init__(self, lower: LowerTier) -> None:
        self.lower = lower
        self.was_late = False
        """Whether a call ever took longer than the queue's deadline."""
        self._hanging: list[asyncio.Task[Any]] = []
        self._sweeping = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        """What a daemon does all the time."""
        while True:
            now_s = CLOCK.now_s()
            self.was_late |= self.lower.queue.is_late(now_s)
            self.lower.queue.sweep(now_s)
            await asyncio.sleep(TICK_S)

    async def write(self, numbers: Sequence[int], tenant: int = 1) -> list[bool]:
        """Which of these values are kept now."""
        values = [[memoryview(value_of(number, tenant))] for number in numbers]
        return await self.lower.write(keys_of(numbers, tenant), values)

    async def read(self, numbers: Sequence[int], tenant: int = 1) -> list[int]:
        """Which of these values come back; a wrong byte fails the test."""
        rooms = [bytearray(VALUE_BYTES) for _ in numbers]
        keys = keys_of(numbers, tenant)
        lengths = await self.lower.read(keys, [[memoryview(room)] for room in rooms])
        found = []
        for number, room, length in zip(numbers, rooms, lengths, strict=True):
            if length is not None:
                is_right = length == VALUE_BYTES and room == value_of(number, tenant)
                assert is_right, f"value {number} came back wrong"
                found.append(number)
        return found

    def rejected(self) -> dict[str, int]:
        """Values that were read and not believed, by reason."""
        found = self.lower.status()["rejected"]
        assert isinstance(found, dict)
        return {reason: number for reason, number in found.items() if number}

    async def attempt(self, call: Coroutine[Any, Any, Answer]) -> Answer | None:
        """What a request gets of a call; None if the tier can't be used.

        A call that hangs is no longer waited for once the queue leaves the tier alone for it.
        """
        task = asyncio.ensure_future(call)
        queue = self.lower.queue
        while not (await asyncio.wait({task}, timeout=TICK_S))[0]:
            is_given_up = queue.breaker_state is BreakerState.OPEN and queue.is_late(CLOCK.now_s())
            if is_given_up:
                self._hanging.append(task)
                return None
        try:
            return task.result()
        except UnavailableError:
            return None

    async def end_what_hangs(self) -> None:
        """Hear the late answers of calls that hung; they are as right as any."""
        for task in self._hanging:
            with contextlib.suppress(UnavailableError):
                await task
        self._hanging.clear()

    async def recover(self, numbers: Sequence[int] = NUMBERS) -> None:
        """Wait until all is kept and served again, with nothing opened anew."""
        await until(lambda: self._is_well(numbers), timeout_s=BACK_TIMEOUT_S, pause_s=TICK_S)

    async def _is_well(self, numbers: Sequence[int]) -> bool:
        try:
            is_kept = all(await self.write(numbers))
            return is_kept and await self.read(numbers) == list(numbers)
        except UnavailableError:
            return False

    async def close(self) -> None:
        """End it; no call is left."""
        self._sweeping.cancel()
        hanging = self.lower.queue.close(CLOSE_S)
        assert not hanging, f"these calls hang: {hanging}"
        self.lower.queue.tier.close()


def open_chain(settings: AnyTierSettings, medium: Callable[[AnyTierSettings, int], Tier]) -> Chain:
    """Put before a medium what a daemon puts there; on the loop's thread.

    Args:
        settings: Of the tier.
        medium: Opens the bare tier for values up to a length, in place of ``open_medium``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_medium", medium)
        return Chain(opening.open_tier(settings, VALUE_BYTES, CLOCK))


@contextlib.asynccontextmanager
async def closing(chain: Chain) -> AsyncIterator[Chain]:
    """Have a chain that is closed in the end."""
    try:
        yield chain
    finally:
        await chain.close()
