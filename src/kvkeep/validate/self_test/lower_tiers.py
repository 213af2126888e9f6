"""The store score of tiers below the pool: wrong reads of a medium, and the tier that verifies."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from kvkeep.model.ids import HASH_BYTES, BlockHash, BlockKey, Namespace
from kvkeep.tiers.faulty import WRONG_READS, FaultyTier, TierFault
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers.verified import VerifiedTier

VALUE_BYTES = 8192
NUM_VALUES = 40


@dataclass(frozen=True, slots=True)
class TierScore:
    """How one kind of wrong read fared."""

    fault: TierFault
    planted: int
    caught: int
    wrong_values: int
    """Values that were given out and were not what was written."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "fault": self.fault.value}


def score_tiers(*, rounds: int, seed: int) -> list[TierScore]:
    """Read values wrongly in every way, below the tier that verifies them."""
    return [_score(fault, rounds, seed) for fault in WRONG_READS]


def _score(fault: TierFault, rounds: int, seed: int) -> TierScore:
    chance = Random(seed)
    keys = [_key(number) for number in range(NUM_VALUES)]
    values = [chance.randbytes(VALUE_BYTES) for _ in keys]
    planted = caught = wrong = 0
    for number in range(rounds):
        faulty = FaultyTier(MemoryTier(2 * NUM_VALUES * VALUE_BYTES), {}, seed + number)
        tier = VerifiedTier(faulty)
        tier.write(keys, [[memoryview(value)] for value in values])
        faulty.chances = {fault: 1.0}
        found = _read(tier, keys)
        planted += faulty.num_struck[fault]
        caught += found.count(None)
        wrong += sum(
            one is not None and one != value for one, value in zip(found, values, strict=True)
        )
    return TierScore(fault, planted, caught, wrong)


def _read(tier: VerifiedTier, keys: Sequence[BlockKey]) -> list[bytes | None]:
    rooms = [bytearray(VALUE_BYTES) for _ in keys]
    lengths = tier.read(keys, [[memoryview(room)] for room in rooms])
    return [
        None if length is None else bytes(room[:length])
        for room, length in zip(rooms, lengths, strict=True)
    ]


def _key(number: int) -> BlockKey:
    """Of one of two tenants."""
    tenant = bytes([1 + number % 2]) * HASH_BYTES
    return BlockKey(Namespace(tenant), BlockHash(number.to_bytes(HASH_BYTES)))
