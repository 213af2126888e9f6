"""Why a request found no more blocks than it did: what the daemon remembers to be able to say so.

All of it is bounded and none of it decides anything. A reason is made when the request is answered,
because an hour, or one store, later the block that was missing is there.
"""

import json
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from kvkeep.core.blocks import BlockState
from kvkeep.core.breaker import BreakerState
from kvkeep.core.eviction.base import fingerprint_of
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.movement.promotion import Wanted
from kvkeep.daemon.movement.proving import Proof
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import Clock
from kvkeep.model.ids import BlockHash, BlockKey, Namespace

REQUESTS_MAX = 1 << 10
NAMESPACES_MAX = 32
STORED_SHARE = 4
"""Blocks of which it is remembered that they once were readable, for each slot of the pool ..."""
STORED_MAX = 1 << 17
"""... and no more than this: some 20 MiB."""
NAMES_BYTES_MAX = 1 << 20
"""Of one answer, for what namespaces are made of."""
SHOWN_MAX = 20
"""Requests in one answer."""
_ROTTEN = -1

Part = dict[str, object]
"""A piece of an answer, for JSON."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one block could not be had."""

    code: str
    """For a program: ``never_stored``, ``evicted``, ``cleared``, ``rotten``, ``being_stored``,
    ``in_tier``, ``tier_away``, ``none`` or ``no_pool``."""
    text: str
    """For a person."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one question was answered."""

    engine_request: str
    engine_id: str
    namespace: Namespace
    group_idx: int
    num_blocks: int
    num_lent: int
    first_missing: BlockHash | None
    reason: Reason
    answered_s: float
    """Monotonic."""


class Misses:
    """Takes notes of answers, and of who asks under which names."""

    def __init__(self, shell: Shell, movement: Movement, clock: Clock) -> None:
        self._shell = shell
        self._movement = movement
        self._clock = clock
        self._outcomes: deque[Outcome] = deque(maxlen=REQUESTS_MAX)
        self._identities: OrderedDict[Namespace, Mapping[str, str]] = OrderedDict()
        """What engines said that their namespaces are made of; the latest last."""
        self._stored: OrderedDict[int, int] = OrderedDict()
        """By fingerprint: how often the pool had been cleared when the block was stored."""
        self._num_clears = 0

    # ---- notes

    def announced(self, namespace: Namespace, identity: Mapping[str, str]) -> None:
        """An engine said what its namespace is made of."""
        self._identities[namespace] = dict(identity)
        self._identities.move_to_end(namespace)
        if len(self._identities) > NAMESPACES_MAX:
            self._identities.popitem(last=False)

    def stored(self, keys: Sequence[BlockKey]) -> None:
        """Blocks became readable in the pool."""
        for key in keys:
            self._stored[fingerprint_of(key)] = self._num_clears
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        geometry = self._shell.pool.geometry
        num_slots = 1 if geometry is None else geometry.num_slots
        while len(self._stored) > min(STORED_MAX, STORED_SHARE * num_slots):
            self._stored.popitem(last=False)

    def cleared(self) -> None:
        """Someone cleared the pool."""
        self._num_clears += 1

    def rotten(self, keys: Sequence[BlockKey]) -> None:
        """Blocks did not match their digests."""
        for key in keys:
            self._stored[fingerprint_of(key)] = _ROTTEN
        self._forget_oldest()

    def answered(
        self, wanted: Wanted, num_lent: int, engine_id: str, engine_request: str | None
    ) -> None:
        """A question was answered; one of an engine that gives no names is not noted."""
        if engine_request is None:
            return
        missing = wanted.keys(num_lent, num_lent + 1)
        reason = Reason("none", "every block was lent")
        if missing:
            reason = self.reason(missing[0], wanted, num_lent)
        self._outcomes.append(
            Outcome(
                engine_request, engine_id, wanted.namespace, wanted.group_idx,
                len(wanted.hashes), num_lent, missing[0].block_hash if missing else None,
                reason, self._clock.now_s(),
            )
        )  # fmt: skip

    # ---- reasons

    def reason(self, key: BlockKey, wanted: Wanted | None = None, num_lent: int = 0) -> Reason:
        """Why this block can't be had in the pool now.

        Args:
            key: Of the block.
            wanted: The question that did not find it, if one was asked just now.
            num_lent: Blocks that were lent for it.
        """
        node = self._shell.node
        if node is None:
            return Reason("no_pool", "no engine has opened the pool yet")
        slot = node.ledger.find(key)
        if slot is not None and slot.state is BlockState.READY:
            return Reason("none", "the block is readable")
        if slot is not None:
            return Reason("being_stored", "the block was just being written")
        holders = [tier for tier in self._movement.tiers if tier.has(key)]
        for tier in holders:
            if not _why_away(tier):
                plan = self._plan_reason(tier, wanted, num_lent)
                return Reason("in_tier", f"the block is in {tier.name} and did not come: {plan}")
        for tier in holders:
            text = f"the block was in {tier.name} when that last answered; {_why_away(tier)}"
            return Reason("tier_away", text)
        lost = self._lost(key)
        return Reason(lost.code, "; ".join([lost.text, *self._not_asked()]))

    def _plan_reason(self, tier: LowerTier, wanted: Wanted | None, num_lent: int) -> str:
        """Why a tier that has the block and can be asked did not give it for this question."""
        pace = self._movement.pace
        if wanted is None or pace is None:
            return "it is brought when an engine asks for it, if that pays"
        # Weighed again: what the planner said last may have been about another request.
        if not pace.may_pay(num_lent, len(wanted.hashes), tier, wanted.prefill_tokens_s):
            return self._movement.plan_reason
        return (
            "too little of the prefix is there to pay, it came too late, could not be read, or the "
            "pool had no room"
        )

    def _not_asked(self) -> list[str]:
        """What can't be asked now for a block that nobody knows of, each in words."""
        movement = self._movement
        away = [why for tier in movement.tiers if (why := _why_away(tier))]
        away += [f"{name} can't be used ({why})" for name, why in movement.closed_tiers.items()]
        away += [
            f"{name} is just being opened"
            for name in movement.opening_tiers
            if name not in movement.closed_tiers
        ]
        return [f"{why}, and may have it" for why in away]

    def _lost(self, key: BlockKey) -> Reason:
        """Why a block is nowhere."""
        num_clears = self._stored.get(fingerprint_of(key))
        if num_clears is None:
            text = "nobody stored the block under this name, as far back as the daemon remembers"
            return Reason("never_stored", text)
        if num_clears == _ROTTEN:
            return Reason("rotten", "the block's bytes did not match their digests: removed")
        if num_clears < self._num_clears:
            return Reason("cleared", "the pool was cleared after the block was stored")
        refusals = [
            f"{tier.name} did not take it ({refusal})"
            for tier in self._movement.tiers
            if (refusal := tier.refusal(key)) is not None
        ]
        if not self._movement.tiers:
            refusals = ["there is no tier below the pool"]
        return Reason("evicted", "; ".join(["the pool made room for other blocks", *refusals]))

    # ---- answers

    def explain_request(self, engine_request: str) -> Part:
        """What became of the requests whose name holds this text; the latest first."""
        found = [each for each in reversed(self._outcomes) if engine_request in each.engine_request]
        return {"requests": [self._shown(each) for each in found[:SHOWN_MAX]], **self._names()}

    def explain_prefix(
        self, namespace: Namespace, group_idx: int, hashes: Sequence[BlockHash]
    ) -> Part:
        """How far this prefix could be read now, and why no further."""
        node = self._shell.node
        num_ready = 0
        if node is not None:
            num_ready = len(node.ledger.readable_prefix(namespace, group_idx, hashes))
        rest = hashes[num_ready : num_ready + 1]
        reason = Reason("none", "every block is readable")
        if rest:
            reason = self.reason(BlockKey(namespace, rest[0], group_idx))
        return {
            "namespace": namespace.hex(),
            "num_blocks": len(hashes),
            "num_ready": num_ready,
            "first_missing": rest[0].hex() if rest else None,
            "reason": asdict(reason),
            **self._names(),
        }

    def _shown(self, outcome: Outcome) -> Part:
        missing = outcome.first_missing
        return {
            "engine_request": outcome.engine_request,
            "engine_id": outcome.engine_id,
            "namespace": outcome.namespace.hex(),
            "num_blocks": outcome.num_blocks,
            "num_lent": outcome.num_lent,
            "first_missing": None if missing is None else missing.hex(),
            "reason": asdict(outcome.reason),
            "age_s": round(self._clock.now_s() - outcome.answered_s, 1),
        }

    def _names(self) -> Part:
        """Every namespace that is known of, the announced ones with what they are made of.

        As many of them in words as fit an answer, the latest first.
        """
        node = self._shell.node
        held = {} if node is None else node.ledger.num_by_namespace()
        names = [
            *reversed(self._identities),
            *(each for each in held if each not in self._identities),
        ]
        shown: list[Part] = []
        room_bytes = NAMES_BYTES_MAX
        for name in names[: 2 * NAMESPACES_MAX]:
            identity = self._identities.get(name)
            room_bytes -= len(json.dumps(identity))
            shown.append(
                {
                    "namespace": name.hex(),
                    "num_blocks": held.get(name, 0),
                    "identity": identity if room_bytes > 0 else None,
                }
            )
        return {"namespaces": shown}


def _why_away(tier: LowerTier) -> str:
    """Why nothing can be had from an open tier now; empty if it answers."""
    if tier.queue.breaker_state is not BreakerState.CLOSED or not tier.is_asked:
        return f"{tier.name} does not answer now: its calls fail or hang"
    if tier.proof is Proof.AWAITED:
        return f"{tier.name} has not answered yet"
    if tier.is_held:
        return f"{tier.name} is just being cleared"
    return ""
