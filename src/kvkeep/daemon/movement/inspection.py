"""What a person asks about tiers while the daemon serves: list, verify, clear.

All of it goes in small steps, so that engines are answered in between. Lower tiers are read through
their queues, with everything that is checked there when a request waits for a block.
"""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.blocks import Slot
from kvkeep.core.node import TIERS_SESSION
from kvkeep.daemon.movement.lower_tier import DELETE_BATCH, LowerTier
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.movement.own_thread import on_own_thread
from kvkeep.daemon.movement.slots import value_bytes
from kvkeep.daemon.recovery import SlotVerifier
from kvkeep.daemon.shell import Shell
from kvkeep.daemon.tier_settings import POOL
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import UNKNOWN_PID, BlockKey, Holder, Namespace
from kvkeep.tiers.base import Lists
from kvkeep.tiers.shared_memory import PoolView

VERIFY_BYTES = 16 << 20
"""Checked in one step."""
LOOKED_AT_MAX = 1 << 20
"""Keys gone through for one listing, whatever is filtered out."""
CLEAR_PASSES_MAX = 3
"""A listing may miss what comes and goes meanwhile."""
TRIES_MAX = 6
TRY_AGAIN_S = 0.5
"""A tier that is left alone is tried again by its breaker after two seconds."""

Part = dict[str, object]
"""A piece of an answer, for JSON."""


@dataclass(slots=True)
class Verified:
    """What a verification has found so far."""

    tier: str
    num_checked: int = 0
    num_right: int = 0
    num_rotten: int = 0
    """Not what was written under their key; they were removed."""
    num_unread: int = 0
    """Gone before they were read, or longer than this pool's blocks."""
    can_list: bool = True
    """False: only those blocks were looked for that this daemon remembers."""

    def part(self) -> Part:
        """As a piece of an answer."""
        return asdict(self)


class Inspection:
    """Runs on the event loop's thread."""

    def __init__(self, shell: Shell, movement: Movement) -> None:
        self._shell = shell
        self._movement = movement
        self._holder = Holder(TIERS_SESSION, UNKNOWN_PID)
        self._is_clearing = False

    def _named(self, name: str) -> list[LowerTier]:
        """The lower tiers of this name; none for the pool.

        Raises:
            InputError: There is no such tier.
        """
        found = [tier for tier in self._movement.tiers if tier.name == name]
        if not found and name != POOL:
            names = dict.fromkeys([POOL, *(tier.name for tier in self._movement.tiers)])
            closed = self._movement.closed_tiers.get(name)
            why = f"can't be used ({closed})" if closed else "is no open tier of this daemon"
            raise InputError(f"{name!r} {why}: choose from {', '.join(names)}")
        return found

    def _pool_slots(self) -> list[Slot]:
        node = self._shell.node
        return [] if node is None else node.ledger.ready_slots()

    # ---- listing

    async def keys(self, name: str, namespace: Namespace | None, limit: int) -> Part:
        """Name blocks of a tier.

        Raises:
            InputError: There is no such tier.
            UnavailableError: It can't be listed now.
        """
        tiers = self._named(name)
        if name == POOL:
            found = self._pool_keys()
            keys = list(itertools.islice(_of(namespace, found), limit + 1))
        else:
            listed = itertools.chain.from_iterable(_listing(tier) for tier in tiers)
            looked_at = itertools.islice(listed, LOOKED_AT_MAX)
            keys = await on_own_thread(
                lambda: list(itertools.islice(_of(namespace, looked_at), limit + 1)), "list"
            )
        return {
            "tier": name,
            "is_whole": len(keys) <= limit and all(map(_can_list, tiers)),
            "can_list": all(map(_can_list, tiers)),
            "has_more": len(keys) > limit,
            "keys": [
                {
                    "namespace": key.namespace.hex(),
                    "block_hash": key.block_hash.hex(),
                    "group_idx": key.group_idx,
                }
                for key in keys[:limit]
            ],
        }

    def _pool_keys(self) -> Iterator[BlockKey]:
        return iter([slot.key for slot in self._pool_slots() if slot.key is not None])

    # ---- verifying

    async def verify(self, name: str) -> AsyncIterator[Part]:
        """Read every block of a tier; what is rotten is removed. Yields what is known so far.

        Raises:
            InputError: There is no such tier.
            UnavailableError: It can't be read now; what was yielded holds.
        """
        tiers = self._named(name)
        found = Verified(name, can_list=all(map(_can_list, tiers)))
        if self._shell.pool.geometry is None:
            yield found.part()
            return
        view = self._shell.pool.view()
        if name == POOL:
            async for part in self._verify_pool(view, found):
                yield part
        for tier in tiers:
            async for part in self._verify_tier(tier, value_bytes(view), found):
                yield part
        yield found.part()

    async def _verify_pool(self, view: PoolView, found: Verified) -> AsyncIterator[Part]:
        keys = list(self._pool_keys())
        verifier = SlotVerifier(view)
        step = max(1, VERIFY_BYTES // view.geometry.layout.block_bytes)
        for start in range(0, len(keys), step):
            batch = keys[start : start + step]
            reply = self._shell.handle(on.BlocksAsked(0, self._holder, batch, float("inf")))
            if not isinstance(reply, do.ReplyRead):
                return
            try:
                lent = {
                    key: slot
                    for key, slot in zip(batch, reply.slots, strict=True)
                    if slot != do.NO_SLOT
                }
                intact = await asyncio.to_thread(_intact, verifier, view, lent)
                rotten = [key for key in lent if key not in intact]
                for key in rotten:
                    self._shell.handle(
                        on.BlocksFoundCorrupt(key.namespace, key.group_idx, [key.block_hash])
                    )
            finally:
                self._shell.handle(on.ReadFinished(self._holder, [reply.lease_id]))
            found.num_checked += len(batch)
            found.num_right += len(intact)
            found.num_rotten += len(rotten)
            found.num_unread += len(batch) - len(lent)
            yield found.part()

    async def _verify_tier(
        self, tier: LowerTier, length: int, found: Verified
    ) -> AsyncIterator[Part]:
        step = max(1, VERIFY_BYTES // length)
        room = np.empty((step, length), dtype=np.uint8)
        listing = _listing(tier)
        while keys := await _next_of(listing, step):
            num_rejected = tier.num_rejected
            lengths = await _read(tier, keys, room)
            num_missing = lengths.count(None)
            # Others read meanwhile; what they find rotten is counted here at most once too often.
            num_rotten = min(num_missing, tier.num_rejected - num_rejected)
            found.num_checked += len(keys)
            found.num_right += len(keys) - num_missing
            found.num_rotten += num_rotten
            found.num_unread += num_missing - num_rotten
            yield found.part()

    # ---- clearing

    async def clear(self, names: Sequence[str]) -> AsyncIterator[Part]:
        """Forget every block in these tiers; yields what was done to each, or why it could not be.

        Lower tiers go first and nothing gets into them or out of them meanwhile, so no copy that
        was on its way brings a block back. The pool goes last: a promotion that began before is
        fenced with it.

        Raises:
            InputError: There is no such tier, or somebody else clears; nothing was done.
            UnavailableError: A copy to a tier hangs; nothing was done.
        """
        tiers = [tier for name in dict.fromkeys(names) for tier in self._named(name)]
        if self._is_clearing:
            raise InputError("tiers are just being cleared: wait until that has ended")
        self._is_clearing = True
        try:
            await self._movement.hold(tiers)
            for tier in tiers:
                try:
                    part = await self._clear_tier(tier)
                except UnavailableError as error:
                    # What it still has comes back when it is asked for; the others have nothing.
                    part = {"tier": tier.name, "left_out": str(error)}
                yield part
            if POOL in names:
                yield self._clear_pool()
        finally:
            self._movement.let_go(tiers)
            self._is_clearing = False

    async def _clear_tier(self, tier: LowerTier) -> Part:
        num_cleared = num_left = 0
        for _ in range(CLEAR_PASSES_MAX):
            listing = _listing(tier)
            num_left = 0
            while keys := await _next_of(listing, DELETE_BATCH):
                await _forget(tier, keys)
                num_left += len(keys)
            num_cleared += num_left
            if not num_left:
                break
        # What the last pass found came in while the tier was being cleared, from another host.
        return {
            "tier": tier.name,
            "num_cleared": num_cleared,
            "num_kept": 0,
            "is_whole": _can_list(tier) and not num_left,
            "can_list": _can_list(tier),
        }

    def _clear_pool(self) -> Part:
        reply = self._shell.handle(on.ClearAsked(0))
        cleared, kept = (
            (reply.num_cleared, reply.num_kept) if isinstance(reply, do.ReplyCleared) else (0, 0)
        )
        return {
            "tier": POOL,
            "num_cleared": cleared,
            "num_kept": kept,
            "is_whole": not kept,
            "can_list": True,
        }


# ---- what takes time


def _of(namespace: Namespace | None, keys: Iterator[BlockKey]) -> Iterator[BlockKey]:
    return (key for key in keys if namespace is None or key.namespace == namespace)


def _can_list(tier: LowerTier) -> bool:
    return isinstance(tier.queue.tier, Lists)


def _listing(tier: LowerTier) -> Iterator[BlockKey]:
    """All keys of a tier, or those that are remembered where it has no list; may block."""
    inner = tier.queue.tier
    return inner.keys() if isinstance(inner, Lists) else iter(tier.known_keys())


async def _next_of(listing: Iterator[BlockKey], number: int) -> list[BlockKey]:
    return await on_own_thread(lambda: list(itertools.islice(listing, number)), "list")


def _intact(verifier: SlotVerifier, view: PoolView, lent: dict[BlockKey, int]) -> set[BlockKey]:
    """Those of these blocks whose header, digests and bytes are right."""
    sequences = defaultdict(list)
    for key in lent:
        sequences[key.namespace, key.group_idx].append(key)
    named: dict[int, BlockKey] = {}
    for (namespace, group_idx), keys in sequences.items():
        slots = np.array([lent[key] for key in keys], dtype=np.int64)
        readable = view.readable(slots, namespace, group_idx, [key.block_hash for key in keys])
        named.update({lent[key]: key for key, is_so in zip(keys, readable, strict=True) if is_so})
    return {named[slot] for slot in verifier.find_intact(list(named))}


async def _read(
    tier: LowerTier, keys: Sequence[BlockKey], room: npt.NDArray[np.uint8]
) -> list[int | None]:
    for _ in range(TRIES_MAX - 1):
        try:
            return await tier.read(keys, [[room[idx].data] for idx in range(len(keys))])
        except UnavailableError:
            await asyncio.sleep(TRY_AGAIN_S)
    return await tier.read(keys, [[room[idx].data] for idx in range(len(keys))])


async def _forget(tier: LowerTier, keys: Sequence[BlockKey]) -> None:
    for _ in range(TRIES_MAX - 1):
        try:
            await tier.forget(keys)
        except UnavailableError:
            await asyncio.sleep(TRY_AGAIN_S)
        else:
            return
    await tier.forget(keys)
