"""What is written to a lower tier, and what is not."""

import pytest

from kvkeep.core.admission import (
    AdmissionPolicy,
    AdmissionSettings,
    AdmitReason,
    SightSketch,
)
from kvkeep.model.errors import InputError

BLOCK_BYTES = 100


def policy(**changes: float) -> AdmissionPolicy:
    """For a tier of ten blocks, five of which may be on probation."""
    settings = {"capacity_bytes": 10 * BLOCK_BYTES, "num_sights": 1000, **changes}
    return AdmissionPolicy(AdmissionSettings(**settings))  # type: ignore[arg-type]


def store(
    admission: AdmissionPolicy,
    fingerprint: int,
    *,
    now_s: float = 0.0,
    free_share: float | None = 1.0,
    num_bytes: int = BLOCK_BYTES,
) -> AdmitReason:
    """A block became readable in the pool, and the tier below is considered."""
    admission.seen(fingerprint)
    return admission.admit(fingerprint, now_s, num_bytes=num_bytes, free_share=free_share)


def test_a_first_sight_is_written_while_there_is_room_to_try() -> None:
    """Half of the tier takes blocks nobody knows; the next one has to be seen again."""
    admission = policy()

    assert [store(admission, block) for block in range(5)] == [AdmitReason.PROBATION] * 5
    assert store(admission, 5) is AdmitReason.PROBATION_FULL
    assert store(admission, 5) is AdmitReason.PROVEN


def test_reuse_gives_room_back() -> None:
    """A block that is seen again has proven itself, and another may be tried."""
    admission = policy()
    for block in range(5):
        store(admission, block)
    admission.seen(2)

    assert admission.probation_bytes == 4 * BLOCK_BYTES
    assert store(admission, 6) is AdmitReason.PROBATION
    assert store(admission, 7) is AdmitReason.PROBATION_FULL


def test_a_dropped_block_gives_room_back_once() -> None:
    """What the tier lost or declined is not held against others, however often it is told."""
    admission = policy()
    for block in range(5):
        store(admission, block)
    admission.dropped(3)
    admission.dropped(3)
    admission.dropped(99)

    assert admission.probation_bytes == 4 * BLOCK_BYTES
    assert store(admission, 6) is AdmitReason.PROBATION


def test_a_block_asked_about_twice_counts_once() -> None:
    """A write that is tried again takes no second piece of the room."""
    admission = policy()
    store(admission, 1)
    for _ in range(10):
        admission.admit(1, 0.0, num_bytes=BLOCK_BYTES, free_share=1.0)

    assert admission.probation_bytes == BLOCK_BYTES


def test_a_block_read_in_the_pool_is_proven() -> None:
    """A block that was read before it leaves the pool goes down whatever room there is."""
    admission = policy(probation_share=0.0)
    admission.seen(1)
    admission.seen(1)

    decision = admission.admit(1, 0.0, num_bytes=BLOCK_BYTES, free_share=0.0)

    assert decision is AdmitReason.PROVEN
    assert decision.is_admitted
    assert admission.probation_bytes == 0


def test_a_full_tier_asks_for_proof() -> None:
    """Where a first sight would push out another block, it has to be seen again."""
    admission = policy()

    assert store(admission, 1, free_share=0.01) is AdmitReason.TIER_FULL
    assert store(admission, 1, free_share=0.01) is AdmitReason.PROVEN
    assert store(admission, 2, free_share=None) is AdmitReason.PROBATION


def test_writes_keep_to_the_limit() -> None:
    """A burst passes, then the rate holds, and time fills the bucket again."""
    admission = policy(write_bytes_per_s=10.0, write_burst_s=20.0)

    assert [store(admission, block).is_admitted for block in range(3)] == [True, True, False]
    assert store(admission, 3, now_s=1.0) is AdmitReason.PROBATION
    assert store(admission, 4, now_s=2.0) is AdmitReason.TOO_FAST
    assert store(admission, 5, now_s=10.5) is AdmitReason.PROBATION


def test_a_block_larger_than_a_burst_is_not_shut_out() -> None:
    """A large block passes when the bucket is full, and is paid for afterwards."""
    admission = policy(write_bytes_per_s=1.0, write_burst_s=10.0)

    assert store(admission, 1).is_admitted
    assert store(admission, 2, now_s=89.0) is AdmitReason.TOO_FAST
    assert store(admission, 3, now_s=91.0).is_admitted


def test_a_refusal_takes_nothing() -> None:
    """Neither room nor budget is booked for a block that isn't written."""
    admission = policy(write_bytes_per_s=100.0, write_burst_s=1.0)
    store(admission, 1, free_share=0.0)
    store(admission, 2)
    store(admission, 3)

    assert admission.probation_bytes == BLOCK_BYTES
    assert admission.num_by_reason[AdmitReason.TOO_FAST] == 1
    assert admission.bytes_by_reason[AdmitReason.TIER_FULL] == BLOCK_BYTES


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity_bytes", 0),
        ("probation_share", 1.5),
        ("probation_share", float("nan")),
        ("full_below_share", -0.1),
        ("write_bytes_per_s", 0.0),
        ("write_burst_s", 0.0),
        ("num_sights", 0),
        ("num_sights", 1 << 30),
    ],
)
def test_a_bad_setting_is_named(name: str, value: float) -> None:
    """A setting that can't work is refused with its name, when it is read."""
    with pytest.raises(InputError, match=name):
        policy(**{name: value})


def test_the_sketch_forgets() -> None:
    """What was seen longer ago than two generations doesn't count."""
    sketch = SightSketch(100, seed=1)
    sketch.add(7)
    for block in range(1000, 1200):
        sketch.add(block)

    assert sketch.count(7) == 0


def test_the_seed_decides_who_meets() -> None:
    """The same sights under the same seed give the same counters, under another seed others."""

    def rows(seed: int) -> list[bytearray]:
        sketch = SightSketch(100, seed=seed)
        for block in range(50):
            sketch.add(block)
        return sketch._young

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
