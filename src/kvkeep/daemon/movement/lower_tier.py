"""One tier below the pool as the event loop sees it: calls to await, and what is known of it."""

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from kvkeep.core.admission import AdmissionPolicy
from kvkeep.core.breaker import BreakerState
from kvkeep.core.eviction.base import fingerprint_of
from kvkeep.core.pulse import Pulse
from kvkeep.daemon.movement.known_keys import KnownKeys
from kvkeep.daemon.movement.proving import Canaries, Proof, Reads, prove_tier
from kvkeep.model.clock import Clock
from kvkeep.model.errors import CorruptDataError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import BATCH_MAX, Gauges, Parts, Probes, Tier
from kvkeep.tiers.io_queue import Outcome, TierQueue
from kvkeep.tiers.wrappers.metered import MeteredTier

log = logging.getLogger(__name__)

REFUSED_MAX = 1 << 14
"""Blocks of which it is remembered why they were not admitted."""

UNWANTED_MAX = 1 << 16
"""Blocks that are to be deleted and are not yet; of more, the first reported are given up."""
DELETE_BATCH = 128
"""Keys deleted in one call: an object store needs a round trip for each, within one deadline."""
DELETE_AGAIN_S = 30.0
"""After a delete that failed: a medium that takes none must not be left alone for it, as it may
still be read."""

BATCH_BYTES = 8 << 20
"""Moved in one call: enough for a tier's bandwidth, little enough for several threads to share."""
READ_PATIENCE_S = 2.0
"""A read that takes longer speaks against the tier, if ..."""
READ_PATIENCE_FACTOR = 10.0
"""... it takes this many times its estimate too."""
READS_MAX = 16
"""Calls of promotions in motion at once: together 128 MiB at most."""

Answer = TypeVar("Answer")


class LowerTier:
    """Runs on the event loop's thread; the queue's threads make the calls."""

    def __init__(
        self,
        queue: TierQueue,
        admission: AdmissionPolicy,
        clock: Clock,
        *,
        value_bytes: int,
        is_local: bool,
        probes_at_once: int,
        rejections: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """Take a tier's queue.

        Args:
            queue: Before the wrapped tier.
            admission: What this tier takes in.
            clock: Monotonic.
            value_bytes: Length of every value.
            is_local: Its ``lookup`` is a lookup in memory and may be called on this thread.
            probes_at_once: Keys in one question; 1 where each costs a round trip of its own.
            rejections: Values that were read and not believed, by reason.
        """
        self.name = queue.tier.name
        self.queue = queue
        self.admission = admission
        self.is_local = is_local
        # Reads together take at most half of the queue, so that no plan overruns it.
        quarter_bytes = queue.limits.queue_bytes_max // 4
        self.batch_blocks = max(1, min(min(BATCH_BYTES, quarter_bytes) // value_bytes, BATCH_MAX))
        """Values in one call."""
        batch_bytes = self.batch_blocks * value_bytes
        num_reads = min(READS_MAX, queue.limits.queue_bytes_max // 2 // batch_bytes)
        self._reads = asyncio.Semaphore(max(1, num_reads))
        self._clock = clock
        self._value_bytes = value_bytes
        self._probes_at_once = probes_at_once
        self._rejections = rejections
        self.known = KnownKeys()
        """What it is believed to have; for a tier that is not local."""
        self._pulse = Pulse(
            queue.limits.deadline_s, latches=not is_local and isinstance(queue.tier, Probes)
        )
        self._looking_since_s: float | None = None
        """Since when a key is asked for that nobody wants."""
        self._look_at_s = 0.0
        self._refused: OrderedDict[int, str] = OrderedDict()
        """By fingerprint: why admission turned a block down last; the latest last."""
        self._unwanted: OrderedDict[BlockKey, None] = OrderedDict()
        """Blocks that it may have and must not give: neither read nor written until deleted."""
        self._is_deleting = False
        self._delete_at_s = 0.0
        self.canaries = Canaries()
        self.proof = Proof.DONE
        """Whoever opens it says if it is not."""
        self.is_held = False
        """It is being cleared: nothing is written to it and nothing is looked for in it."""

    # ---- what is known

    @property
    def is_closed_off(self) -> bool:
        """Whether nothing is to be looked for in it or written to it now."""
        return self.is_held or self.proof is Proof.AWAITED

    @property
    def is_asked(self) -> bool:
        """Whether a call would go through now: true again when the breaker wants a trial."""
        return self.queue.estimate_s(0) != float("inf") and not self.is_still

    @property
    def is_still(self) -> bool:
        """Whether calls under way take so long that nobody should wait for others."""
        return self._pulse.is_still(self._clock.now_s())

    def may_have(self, key: BlockKey) -> bool:
        """False if it surely has not got this block; costs no call."""
        if self.is_closed_off or self.is_still or key in self._unwanted:
            return False
        return self.has(key) if self.is_local else self.is_asked

    def has(self, key: BlockKey) -> bool:
        """True if it has this block, as far as that is known without a call."""
        if key in self._unwanted:
            return False
        tier = self.queue.tier
        if self.is_local and isinstance(tier, Probes):
            return tier.lookup([key])[0]
        return key in self.known

    def _found(self, keys: Sequence[BlockKey], are_there: Sequence[bool]) -> None:
        if not self.is_local:
            self.known.found(keys, are_there, self._clock.now_s())

    def _learn(self, keys: Sequence[BlockKey], are_there: Sequence[bool]) -> None:
        if self.is_local:
            return
        self.known.learn(keys, are_there)

    def status(self) -> dict[str, object]:
        """What a person or a script asks about it."""
        tier, meter = self.queue.tier, None
        if isinstance(tier, MeteredTier):
            meter = tier.meter()
        use = tier.use() if isinstance(tier, Gauges) else None
        return {
            "name": self.name,
            "breaker": self.queue.breaker_state.value,
            "answers": not self.is_still,
            "proof": self.proof.value,
            "queued_bytes": self.queue.queued_bytes,
            "deletions_waiting": len(self._unwanted),
            "num_values": None if use is None else use.num_values,
            "used_bytes": None if use is None else use.used_bytes,
            "capacity_bytes": None if use is None else use.capacity_bytes,
            "reads": None if meter is None else asdict(meter.read),
            "writes": None if meter is None else asdict(meter.write),
            "admitted": {r.name.lower(): n for r, n in self.admission.num_by_reason.items()},
            "rejected": dict(self._rejections()),
        }

    @property
    def num_rejected(self) -> int:
        """Values that were read and not believed, for whatever reason."""
        return sum(n for why, n in self._rejections().items() if not why.endswith("failed"))

    # ---- what it takes in

    def seen(self, key: BlockKey) -> None:
        """Count a use of the block by an engine."""
        self.admission.seen(fingerprint_of(key))

    def admits(self, key: BlockKey) -> bool:
        """Decide whether this block is to be written; if so, ``write`` or ``give_up`` follows."""
        if self.is_closed_off or key in self._unwanted or self.has(key) or not self.is_asked:
            return False
        tier = self.queue.tier
        free_share = None
        if isinstance(tier, Gauges):
            use = tier.use()
            if use.capacity_bytes:
                free_share = 1.0 - use.used_bytes / use.capacity_bytes
        fingerprint = fingerprint_of(key)
        reason = self.admission.admit(
            fingerprint, self._clock.now_s(), num_bytes=self._value_bytes, free_share=free_share
        )
        self._refused.pop(fingerprint, None)
        if not reason.is_admitted:
            self._refused[fingerprint] = reason.value
            if len(self._refused) > REFUSED_MAX:
                self._refused.popitem(last=False)
        return reason.is_admitted

    def refusal(self, key: BlockKey) -> str | None:
        """Why admission turned this block down last, if it did and that is remembered."""
        return self._refused.get(fingerprint_of(key))

    def give_up(self, key: BlockKey) -> None:
        """What was admitted is not there after all."""
        self.admission.dropped(fingerprint_of(key))

    # ---- calls

    def _require_proof(self) -> None:
        if self.proof is Proof.AWAITED:
            raise UnavailableError(f"the tier {self.name} has not proven yet that it keeps bytes")

    async def prove(self) -> Reads:
        """As ``prove_tier``, in a job of the queue: its breaker and its limits count here too.

        Raises:
            CorruptDataError: Other bytes came back; the tier must not be used.
            UnavailableError: Refused, or failed.
        """

        def attempt(tier: Tier) -> Reads | CorruptDataError:
            try:
                return prove_tier(tier, self._value_bytes, lambda: self.num_rejected, self.canaries)
            except CorruptDataError as error:
                return error

        found: Reads | CorruptDataError = await self._call(
            partial(self.queue.submit_proof, attempt)
        )
        if isinstance(found, CorruptDataError):
            raise found
        return found

    async def probe(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of these blocks it has, as far as it can tell; none if it can't be asked."""
        if self.is_closed_off or self.is_still:
            return [False] * len(keys)
        found = await self._probe(keys)
        # A question may have been on its way when clearing began, or a block was found rotten.
        if self.is_closed_off:
            return [False] * len(keys)
        return [
            is_there and key not in self._unwanted
            for key, is_there in zip(keys, found, strict=True)
        ]

    async def _probe(self, keys: Sequence[BlockKey]) -> list[bool]:
        tier = self.queue.tier
        if not isinstance(tier, Probes):
            return [False] * len(keys)
        try:
            if self._probes_at_once == 1:
                return await self._bisect(keys)
            found: list[bool] = []
            for start in range(0, len(keys), self._probes_at_once):
                batch = keys[start : start + self._probes_at_once]
                if self.is_local:
                    answer = tier.lookup(batch)
                    await asyncio.sleep(0)  # others have their turn
                else:
                    answer = await self._probe_batch(batch)
                found += answer
                if not all(answer):
                    # What lies behind a gap is of no use to a prefix.
                    break
        except UnavailableError:
            return [False] * len(keys)
        return found + [False] * (len(keys) - len(found))

    async def _probe_batch(self, keys: Sequence[BlockKey]) -> list[bool]:
        self.known.mentioned(keys[0])
        found: list[bool] = await self._call(
            partial(self.queue.submit_probe, keys), patience_s=None
        )
        self._found(keys, found)
        return found

    async def _bisect(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Find the end of a prefix in few questions: blocks are stored from the first on.

        Where that is not so (some were dropped), a read of a missing one tells.
        """
        low, high = 0, len(keys)
        middle = 0
        while low < high:
            (is_there,) = await self._probe_batch([keys[middle]])
            if is_there:
                low = middle + 1
            else:
                high = middle
            # The first misses most often, then the last hits most often.
            middle = high - 1 if middle == 0 and is_there else (low + high) // 2
        return [True] * low + [False] * (len(keys) - low)

    async def take_stock(self, keys: Sequence[BlockKey]) -> None:
        """Learn which of these blocks it has; a tier that can't be asked may get them again.

        A question costs far less than the bytes of a block, in the object store too.
        """
        tier = self.queue.tier
        if self.is_local or self.is_closed_off or not isinstance(tier, Probes):
            return
        with contextlib.suppress(UnavailableError):
            await self._probe_batch(keys)

    async def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """As ``Tier.read``; ends only when the memory is the caller's again.

        Raises:
            UnavailableError: Refused, or failed.
        """
        self._require_proof()
        read = partial(self.queue.submit_read, keys, into)
        async with self._reads:
            estimate_s = self.queue.estimate_s(len(keys) * self._value_bytes)
            patience_s = READ_PATIENCE_FACTOR * (estimate_s or float("inf"))
            lengths: list[int | None] = await self._call(
                read, patience_s=max(READ_PATIENCE_S, patience_s)
            )
        lengths = [
            None if key in self._unwanted else length
            for key, length in zip(keys, lengths, strict=True)
        ]
        self._found(keys, [length is not None for length in lengths])
        return lengths

    async def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """As ``Tier.write``; ends only when the memory is the caller's again.

        Raises:
            UnavailableError: Refused, or failed.
        """
        try:
            self._require_proof()
            write = partial(self.queue.submit_write, keys, values)
            kept: list[bool] = await self._call(write)
        except UnavailableError:
            for key in keys:
                self.give_up(key)
            raise
        self._learn(keys, kept)
        for key, is_kept in zip(keys, kept, strict=True):
            if not is_kept:
                self.give_up(key)
        return kept

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Have these blocks forgotten, sooner or later; until then they are as if forgotten."""
        self._learn(keys, [False] * len(keys))
        for key in keys:
            self.give_up(key)
            self._unwanted[key] = None
        while len(self._unwanted) > UNWANTED_MAX:
            self._unwanted.popitem(last=False)
        self._delete_unwanted()

    def tick(self) -> None:
        """Several times a second: notice calls that hang, and try again what has to be done."""
        self.queue.sweep(self._clock.now_s())
        if self.canaries.are_left and self.proof is not Proof.AWAITED:
            self.canaries.are_left = False
            self.delete(self.canaries.keys)
        self._delete_unwanted()
        if self._pulse.look(self._clock.now_s()):
            log.warning("a tier does not answer. tier=%s", self.name)
            self.known.doubt()
        self._look()

    def _look(self) -> None:
        """Ask now and then for a key that it should have: its loss may not show otherwise."""
        now_s, key = self._clock.now_s(), self.known.sample
        since_s = self._looking_since_s
        is_busy = since_s is not None and now_s - since_s <= self.queue.limits.deadline_s
        if self.is_local or self.is_closed_off or key is None or is_busy or now_s < self._look_at_s:
            return
        loop = asyncio.get_running_loop()

        def done(outcome: Outcome[list[bool]]) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._looked, key, ticket, outcome)

        if self.queue.submit_probe([key], done):
            ticket = self._pulse.begin(now_s)
            self._looking_since_s = now_s

    def _looked(self, key: BlockKey, ticket: int, outcome: Outcome[list[bool]]) -> None:
        self._looking_since_s = None
        self._heard(outcome, ticket, is_question=True)
        if outcome.answer is not None:
            self._found([key], outcome.answer)
        self._look_at_s = self._clock.now_s() + self.known.look_again_s

    def _heard(self, outcome: Outcome[Answer], ticket: int, *, is_question: bool) -> None:
        """A call has ended: what could not be reached may come back without what it had."""
        is_good, now_s = outcome.error is None, self._clock.now_s()
        self._pulse.end(ticket, now_s, is_good=is_good, is_question=is_question)
        if is_good:
            self.known.answered()
        elif not self.is_local:
            self.known.doubt()

    @property
    def wants_stock(self) -> bool:
        """Whether it is back and has to be asked for the blocks of the pool."""
        return not self.is_closed_off and self.known.wants_stock(self._clock.now_s())

    def _delete_unwanted(self) -> None:
        """Begin to delete some of them, unless that is under way or can't be done now."""
        if self._is_deleting or not self._unwanted or self._clock.now_s() < self._delete_at_s:
            return
        # Others find out whether a tier that failed is back: these can wait.
        if self.queue.breaker_state is not BreakerState.CLOSED:
            return
        loop = asyncio.get_running_loop()
        batch = list(itertools.islice(self._unwanted, DELETE_BATCH))

        def done(outcome: Outcome[None]) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._deleted, batch, outcome)

        self._is_deleting = self.queue.submit_delete(batch, done)

    def _deleted(self, keys: Sequence[BlockKey], outcome: Outcome[None]) -> None:
        self._is_deleting = False
        if outcome.error is not None:
            self._delete_at_s = self._clock.now_s() + DELETE_AGAIN_S
            return
        for key in keys:
            self._unwanted.pop(key, None)
        self._delete_unwanted()

    async def forget(self, keys: Sequence[BlockKey]) -> None:
        """Have these blocks forgotten, at most ``BATCH_MAX``; ends when they are.

        Raises:
            UnavailableError: Refused, or failed; some may be gone.
        """
        ended: asyncio.Future[UnavailableError | None] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def done(outcome: Outcome[None]) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set_result, outcome.error)

        if not self.queue.submit_delete(keys, done):
            raise UnavailableError(f"the tier {self.name} is full or left alone for now")
        error = await asyncio.shield(ended)
        if error is not None:
            raise error
        self._learn(keys, [False] * len(keys))
        for key in keys:
            self.give_up(key)
            self._unwanted.pop(key, None)

    def known_keys(self) -> list[BlockKey]:
        """What it is remembered to keep, of a tier that can't list its keys."""
        return self.known.keys()

    async def _call(
        self,
        submit: Callable[[Callable[[Outcome[Answer]], None]], bool],
        patience_s: float | None = float("inf"),
    ) -> Answer:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Outcome[Answer]] = loop.create_future()

        def settle(outcome: Outcome[Answer]) -> None:
            # Also where nobody waits for it any more.
            self._heard(outcome, ticket, is_question=patience_s is None)
            if not ended.done():
                ended.set_result(outcome)

        def done(outcome: Outcome[Answer]) -> None:
            # On a thread of the queue; the loop may have ended before a late call did.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, outcome)

        if not submit(done):
            raise UnavailableError(f"the tier {self.name} is full or left alone for now")
        ticket = self._pulse.begin(self._clock.now_s(), patience_s)  # the loop settles later
        outcome = await ended
        if outcome.error is not None or outcome.answer is None:
            raise outcome.error or UnavailableError(f"the tier {self.name} gave no answer")
        return outcome.answer
