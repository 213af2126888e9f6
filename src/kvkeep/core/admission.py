"""Which blocks are worth writing to a lower tier.

A block that was stored or read before is worth it. A block that is seen for the first time is
worth it while there is room to try: *probation*, a share of the tier that blocks without proof of
reuse may hold. So a working set is kept on its first pass, and traffic without reuse stops at the
share. Reasons and figures: docs/decisions/0014-eviction-and-admission.md.
"""

from dataclasses import dataclass
from enum import Enum

from kvkeep.model.errors import InputError

SIGHTS_MAX = 1 << 22
"""Sights remembered at most: the sketch then takes 128 MiB."""

PROBATION_BLOCKS_MAX = 1 << 20
"""Blocks on probation at once: about 200 bytes of memory each."""

_COUNT_MAX = 255
_NUM_ROWS = 4
_ROW_PER_SIGHT = 4
_MASK = (1 << 64) - 1
_MIX = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, odd: spreads what the seed changed


class SightSketch:
    """How often each fingerprint was counted lately: a count-min sketch of two generations.

    Bounds: a count is never less than the times the fingerprint was counted among the last
    ``num_sights`` (up to 255), as nothing younger is forgotten; nothing older than twice
    ``num_sights`` counts. It may be more: a fingerprint that was not counted has a count above 0
    with a probability of at most 2 * (1 - exp(-1/4))**4, that is 0.5 %, because each of four rows
    has at least four counters for each of a generation's sights.

    Memory: 32 bytes for each of ``num_sights``, or up to twice that, as rows are powers of two.
    """

    def __init__(self, num_sights: int, *, seed: int) -> None:
        self._num_sights = num_sights
        self._num_young = 0
        self._seed = (seed * _MIX + 1) & _MASK
        self._last_place = (1 << (num_sights * _ROW_PER_SIGHT - 1).bit_length()) - 1
        self._young = self._empty()
        self._old = self._empty()

    def _empty(self) -> list[bytearray]:
        return [bytearray(self._last_place + 1) for _ in range(_NUM_ROWS)]

    def _places(self, fingerprint: int) -> tuple[int, int, int, int]:
        """One counter of each row, from two hashes (Kirsch and Mitzenmacher, 2008)."""
        mixed = ((fingerprint ^ self._seed) * _MIX) & _MASK
        mixed = ((mixed ^ (mixed >> 32)) * _MIX) & _MASK
        first, step, last = mixed >> 32, mixed | 1, self._last_place
        second = first + step
        third = second + step
        return first & last, second & last, third & last, (third + step) & last

    def add(self, fingerprint: int) -> None:
        """Count one sight; the oldest generation is forgotten when the young one is full."""
        if self._num_young == self._num_sights:
            self._old, self._young, self._num_young = self._young, self._empty(), 0
        self._num_young += 1
        # Written out, as this runs for each block that is read.
        first, second, third, fourth = self._places(fingerprint)
        row_1, row_2, row_3, row_4 = self._young
        least = min(row_1[first], row_2[second], row_3[third], row_4[fourth])
        if least == _COUNT_MAX:
            return
        # Only the smallest counters grow: the others hold somebody else's sights already.
        if row_1[first] == least:
            row_1[first] = least + 1
        if row_2[second] == least:
            row_2[second] = least + 1
        if row_3[third] == least:
            row_3[third] = least + 1
        if row_4[fourth] == least:
            row_4[fourth] = least + 1

    def count(self, fingerprint: int) -> int:
        """At least the sights among the last ``num_sights``."""
        places = self._places(fingerprint)
        return self._least(self._young, places) + self._least(self._old, places)

    @staticmethod
    def _least(rows: list[bytearray], places: tuple[int, int, int, int]) -> int:
        return min(
            rows[0][places[0]], rows[1][places[1]], rows[2][places[2]], rows[3][places[3]]
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """How much a tier may take in."""

    capacity_bytes: int
    """What the tier can hold, or what it is meant to hold where it has no limit of its own."""
    probation_share: float = 0.5
    """Of the capacity, for blocks without proof of reuse; 0 asks for proof always. A working set
    is kept on its first pass if it fits into this share."""
    full_below_share: float = 0.02
    """Below this free share of the tier proof is always asked for: a block on trial would push
    out another, which would make room for the next without end."""
    write_bytes_per_s: float | None = None
    """Long-term limit of writes; None for none."""
    write_burst_s: float = 30.0
    """After a pause, writes of this long at the limit may come at once."""
    num_sights: int = 1 << 17
    """Sights remembered at least; best as many as the tier holds blocks."""
    seed: int = 0
    """Decides which blocks share counters."""

    def __post_init__(self) -> None:
        """Refuse what can't work.

        Raises:
            InputError: Says which setting, and what it has to be.
        """
        if self.capacity_bytes < 1:
            raise InputError(
                f"capacity_bytes must be at least 1. capacity_bytes={self.capacity_bytes}"
            )
        for name in ("probation_share", "full_below_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must be from 0 to 1. {name}={getattr(self, name)}")
        if self.write_bytes_per_s is not None and not self.write_bytes_per_s > 0:
            raise InputError(
                "write_bytes_per_s must be above 0, or absent for no limit. "
                f"write_bytes_per_s={self.write_bytes_per_s}"
            )
        if not self.write_burst_s > 0:
            raise InputError(f"write_burst_s must be above 0. write_burst_s={self.write_burst_s}")
        if not 1 <= self.num_sights <= SIGHTS_MAX:
            raise InputError(
                f"num_sights must be from 1 to {SIGHTS_MAX}. num_sights={self.num_sights}"
            )


class AdmitReason(Enum):
    """What was decided on one block, and why."""

    PROVEN = "seen before"
    PROBATION = "seen for the first time, and there is room to try"
    PROBATION_FULL = "seen for the first time, and others without proof hold the room to try"
    TIER_FULL = "seen for the first time, and it would push out another block"
    TOO_FAST = "writes are at their limit"

    @property
    def is_admitted(self) -> bool:
        """Whether the block is to be written."""
        return self in (AdmitReason.PROVEN, AdmitReason.PROBATION)


class AdmissionPolicy:
    """Decides what one tier takes in, and remembers what it took without proof.

    Life of one block: ``seen`` each time it is stored or read; ``admit`` before it would be
    written; if admitted, ``dropped`` once the tier does not hold it after all: the write failed or
    was declined, or the block was evicted or deleted.

    Not thread-safe: one thread calls.
    """

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        self._sketch = SightSketch(settings.num_sights, seed=settings.seed)
        self._probation: dict[int, int] = {}
        """Fingerprint to bytes of the blocks that were written without proof."""
        self._probation_bytes_max = int(settings.probation_share * settings.capacity_bytes)
        self.probation_bytes = 0
        self._budget_bytes = (settings.write_bytes_per_s or 0.0) * settings.write_burst_s
        """What may be written now; below 0 after a block larger than that."""
        self._budget_at_s: float | None = None
        self.num_by_reason = dict.fromkeys(AdmitReason, 0)
        self.bytes_by_reason = dict.fromkeys(AdmitReason, 0)

    def seen(self, fingerprint: int) -> None:
        """Count a use: an engine's store of the block became readable, or one read it.

        Once per use: not for a lookup that missed, as the store of what was missing follows; not
        for each rank that stores its part. A block on probation is thereby proven.
        """
        self._sketch.add(fingerprint)
        self.dropped(fingerprint)

    def dropped(self, fingerprint: int) -> None:
        """The tier does not hold the block: give its room to try back; no error if it had none."""
        if fingerprint in self._probation:
            self.probation_bytes -= self._probation.pop(fingerprint)

    def admit(
        self, fingerprint: int, now_s: float, *, num_bytes: int, free_share: float | None
    ) -> AdmitReason:
        """Decide on one block, and book what it takes if it is admitted.

        Args:
            fingerprint: Of a block that was ``seen`` at least once, when it was stored.
            now_s: Monotonic time.
            num_bytes: Bytes that the tier would hold.
            free_share: Share of the capacity that can be written before the tier evicts; None if
                unknown.

        Returns:
            The decision with its reason; a refused block may be asked about again.
        """
        reason = self._judge(fingerprint, num_bytes, free_share)
        if reason.is_admitted and not self._has_budget(now_s):
            reason = AdmitReason.TOO_FAST
        if reason.is_admitted and self._settings.write_bytes_per_s is not None:
            self._budget_bytes -= num_bytes
        if reason is AdmitReason.PROBATION:
            self.dropped(fingerprint)  # written again: its bytes count once
            self._probation[fingerprint] = num_bytes
            self.probation_bytes += num_bytes
        self.num_by_reason[reason] += 1
        self.bytes_by_reason[reason] += num_bytes
        return reason

    def _judge(self, fingerprint: int, num_bytes: int, free_share: float | None) -> AdmitReason:
        if self._sketch.count(fingerprint) > 1:
            return AdmitReason.PROVEN
        if free_share is not None and free_share < self._settings.full_below_share:
            return AdmitReason.TIER_FULL
        held_bytes = self.probation_bytes - self._probation.get(fingerprint, 0)
        is_room = held_bytes + num_bytes <= self._probation_bytes_max
        if not is_room or len(self._probation) >= PROBATION_BLOCKS_MAX:
            return AdmitReason.PROBATION_FULL
        return AdmitReason.PROBATION

    def _has_budget(self, now_s: float) -> bool:
        """Fill the bucket up to now; a block is let through whole while anything is in it."""
        rate = self._settings.write_bytes_per_s
        if rate is None:
            return True
        if self._budget_at_s is not None:
            filled = self._budget_bytes + rate * max(0.0, now_s - self._budget_at_s)
            self._budget_bytes = min(filled, rate * self._settings.write_burst_s)
        self._budget_at_s = now_s
        return self._budget_bytes > 0
