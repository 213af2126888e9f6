"""Handoffs through the pool, as the scheduler sides of their two engines see them.

A router has the prefill engine answer one token under ``{"kvkeep": {"hand_off": "prefill"}}``. All
full blocks of the prompt are stored then, and the answer names the last of them by its hash, the
ticket. The decode engine gets it with the same prompt and looks for those blocks in the pool, where
they may still be on their way; it waits for them so long and no longer.

A ticket opens nothing. It is compared with what the engine hashed from the request's own tokens,
under its own namespace, salt and tenant's key, so a wrong or invented one costs its sender the wait
and nobody anything else. Whatever is wrong with a request's parameters, the request is answered as
any other, and the reason is counted.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from kvkeep.model.clock import Clock
from kvkeep.model.ids import HASH_BYTES, BlockHash
from kvkeep.protocol.messages import HandoffOutcome

log = logging.getLogger(__name__)

FIELD = "kvkeep"
"""Of ``kv_transfer_params``; the other fields are other connectors'."""
TOKENS_MAX = 1 << 30
PAUSE_MIN_S = 0.002
PAUSE_MAX_S = 0.05
"""Between two questions of a request that waits: twice as long each time, so that a wait of a
second asks some twenty times."""

Report = Callable[[HandoffOutcome, int, int], None]
"""Told the outcome, the blocks that were missed, and the microseconds that were waited."""


class PrefillLeg(
    msgspec.Struct, frozen=True, tag_field="hand_off", tag="prefill", forbid_unknown_fields=True
):
    """The request's blocks are for another engine."""


class DecodeLeg(
    msgspec.Struct, frozen=True, tag_field="hand_off", tag="decode", forbid_unknown_fields=True
):
    """The request's blocks come from another engine."""

    ticket: Annotated[
        str, msgspec.Meta(min_length=2 * HASH_BYTES, max_length=2 * HASH_BYTES)
    ]  # fmt: skip
    """The hash of the last block named, in hexadecimal digits."""
    tokens: Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]
    """Leading tokens of the prompt that the blocks hold."""


@dataclass(slots=True)
class Awaited:
    """Blocks that a prefill engine named, and how long they have been waited for."""

    num_blocks: int
    """Leading blocks that are waited for; none that holds the prompt's last token."""
    begun_s: float | None = None
    """When they were first looked for."""
    pause_s: float = PAUSE_MIN_S
    ask_after_s: float = 0.0


class Handoffs:
    """One engine's part in handoffs. Used by one thread."""

    def __init__(self, report: Report, clock: Clock, *, block_tokens: int, wait_s: float) -> None:
        """Take part.

        Args:
            report: Where outcomes go.
            clock: Monotonic.
            block_tokens: Tokens per block.
            wait_s: How long a request waits for blocks that were named to it.
        """
        self._report = report
        self._clock = clock
        self._block_tokens = block_tokens
        self._wait_s = wait_s
        self.num_by_outcome: dict[HandoffOutcome, int] = {}

    def find_leg(self, request: Any) -> PrefillLeg | DecodeLeg | None:
        """Which part of a handoff a request is, if any. Its parameters may be anybody's."""
        params = request.kv_transfer_params
        if not isinstance(params, dict) or FIELD not in params:
            return None
        try:
            return msgspec.convert(params[FIELD], PrefillLeg | DecodeLeg)
        except msgspec.ValidationError as error:
            self._count("refused", f"its parameters are malformed ({error})", request)
            return None

    def await_blocks(
        self, leg: DecodeLeg, hashes: Sequence[BlockHash], request: Any
    ) -> Awaited | None:
        """What to wait for; None where the ticket does not name this request's own blocks.

        Args:
            leg: As the request says.
            hashes: Of the full blocks of the request's tokens.
            request: vLLM's.
        """
        num_blocks, rest = divmod(leg.tokens, self._block_tokens)
        is_named = not rest and 0 < num_blocks <= len(hashes)
        if not is_named or hashes[num_blocks - 1].hex() != leg.ticket:
            reason = "its ticket is of another prompt, or of an engine with other settings"
            self._count("refused", reason, request)
            return None
        return Awaited(min(num_blocks, (request.num_tokens - 1) // self._block_tokens))

    def is_early(self, awaited: Awaited) -> bool:
        """Whether it is too soon to look for the blocks again."""
        return self._clock.now_s() < awaited.ask_after_s

    def must_wait(
        self, awaited: Awaited, num_blocks: int, *, can_come: bool, request: Any
    ) -> bool:  # fmt: skip
        """Whether to go on waiting; where not, the wait is over and was counted.

        Args:
            awaited: Changed to say when to look again.
            num_blocks: Leading blocks that were found now, in the pool or on the engine.
            can_come: Whether there is a daemon that can lend more.
            request: vLLM's.
        """
        now_s = self._clock.now_s()
        if awaited.begun_s is None:
            awaited.begun_s = now_s
        waited_s = now_s - awaited.begun_s
        num_missed = max(0, awaited.num_blocks - num_blocks)
        if num_missed and can_come and waited_s < self._wait_s:
            awaited.ask_after_s = min(now_s + awaited.pause_s, awaited.begun_s + self._wait_s)
            awaited.pause_s = min(PAUSE_MAX_S, 2 * awaited.pause_s)
            return True
        reason = f"{num_missed} of {awaited.num_blocks} blocks were not there in {waited_s:.3f} s"
        self._count("partial" if num_missed else "whole", reason, request, num_missed, waited_s)
        return False

    def offer(self, request: Any, hashes: Sequence[BlockHash], num_stored: int) -> dict[str, Any]:
        """What a prefill engine answers for the decode engine: ``kv_transfer_params``.

        Args:
            request: vLLM's; it ended well.
            hashes: Of the full blocks of its tokens.
            num_stored: Leading blocks that are in the pool or on their way there.

        Returns:
            The ticket, or nothing where no block can be named. Of a prompt without a full block
            there is nothing to hand over, which is no failure: its ticket is empty.
        """
        num_in_prompt = request.num_prompt_tokens // self._block_tokens
        if not num_in_prompt:
            self._count("offered", "", request)
            return {FIELD: {"ticket": "", "tokens": 0}}
        num_blocks = min(num_stored, num_in_prompt)
        if not num_blocks:
            self._count("not_offered", "no block of its prompt was stored", request)
            return {}
        self._count("offered", "", request)
        ticket = hashes[num_blocks - 1].hex()
        return {FIELD: {"ticket": ticket, "tokens": num_blocks * self._block_tokens}}

    def pass_by(self, leg: PrefillLeg | DecodeLeg, reason: object, request: Any) -> None:
        """Count a handoff of a request that kvkeep has to leave alone."""
        is_prefill = isinstance(leg, PrefillLeg)
        self._count("not_offered" if is_prefill else "refused", str(reason), request)

    def _count(
        self,
        outcome: HandoffOutcome,
        reason: str,
        request: Any,
        num_missed: int = 0,
        waited_s: float = 0.0,
    ) -> None:
        count = self.num_by_outcome[outcome] = self.num_by_outcome.get(outcome, 0) + 1
        self._report(outcome, num_missed, int(waited_s * 1e6))
        # The first, the second, the fourth and so on: clients may cause as many as they like.
        if outcome not in ("offered", "whole") and not count & (count - 1):
            log.warning(
                "kvkeep: handoff %s (%d so far): %s. request=%s",
                outcome, count, reason[:300], request.request_id,
            )  # fmt: skip
