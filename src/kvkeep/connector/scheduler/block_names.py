"""What this engine's stored blocks are of, told to routers through vLLM's own event stream.

A daemon announces numbers (model/announced.py); a router has to know which tokens they stand for.
Engines publish token ids to their router anyway, so an event more tells nobody anything new.
Bounded: events that nobody takes, and numbers remembered as told.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvkeep.model.announced import number_of
from kvkeep.model.ids import BlockHash

WAITING_MAX = 1024
"""Events of one step; vLLM takes them at its end."""
TOLD_MAX = 1 << 16
"""Blocks that need not be told again; 2 million tokens in blocks of 32."""


@dataclass(frozen=True, slots=True)
class Named:
    """Blocks that follow each other in one sequence."""

    numbers: list[int]
    parent: int | None
    """Number of the block before the first; None where there is none."""
    token_ids: list[int]
    salt: str | None
    """Of a first block that is salted."""
    lora_name: str | None


class BlockNames:
    """Collects names until vLLM asks for events; on the engine core's thread."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._waiting: deque[Named] = deque(maxlen=WAITING_MAX)
        self._told: OrderedDict[int, None] = OrderedDict()

    def tell(self, request: Any, hashes: Sequence[BlockHash]) -> None:
        """Name the leading blocks of a request, as far as they were not named lately.

        Args:
            request: vLLM's.
            hashes: Of its leading blocks.
        """
        numbers = [number_of(block_hash) for block_hash in hashes]
        first = next((i for i, number in enumerate(numbers) if number not in self._told), None)
        if first is None:
            return
        tokens = request.all_token_ids[
            first * self._block_tokens : len(hashes) * self._block_tokens
        ]
        lora = request.lora_request
        self._waiting.append(
            Named(
                numbers[first:],
                numbers[first - 1] if first else None,
                list(tokens),
                None if first else request.cache_salt or None,
                None if lora is None else lora.lora_name,
            )
        )
        for number in numbers[first:]:
            self._told[number] = None
        while len(self._told) > TOLD_MAX:
            self._told.popitem(last=False)

    def take(self) -> list[Named]:
        """Return what was named since the last call."""
        found = list(self._waiting)
        self._waiting.clear()
        return found
