"""Admission over any traffic: its bounds, and what a pool with a tier below makes of workloads."""

from collections import Counter, OrderedDict
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.core.admission import AdmissionPolicy, AdmissionSettings, AdmitReason, SightSketch
from kvkeep.core.eviction.s3fifo import S3FifoPolicy

BLOCK_BYTES = 1_000_000


@given(st.lists(st.integers(0, 40), max_size=300), st.integers(1, 60), st.integers(0, 3))
def test_no_recent_sight_is_forgotten(sights: list[int], num_sights: int, seed: int) -> None:
    """A count is at least the sights among the last ``num_sights``."""
    sketch = SightSketch(num_sights, seed=seed)
    for idx, fingerprint in enumerate(sights):
        sketch.add(fingerprint)
        lately = Counter(sights[max(0, idx + 1 - num_sights) : idx + 1])

        assert all(sketch.count(one) >= min(255, num) for one, num in lately.items())


@pytest.mark.parametrize("seed", range(3))
def test_the_sketch_errs_as_seldom_as_it_says(seed: int) -> None:
    """Of fingerprints never seen, at most 0.5 % look seen though both generations are full."""
    chance = Random(seed)
    sketch = SightSketch(10_000, seed=seed)
    for _ in range(20_000):
        sketch.add(chance.getrandbits(64))
    num_wrong = sum(sketch.count(chance.getrandbits(64)) > 0 for _ in range(20_000))
    print(f"{num_wrong / 20_000:.3%} of fingerprints never seen look seen")

    assert num_wrong <= 0.005 * 20_000


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["store", "read", "drop"]),
        st.integers(0, 12),
        st.integers(1, 300),
        st.sampled_from([0.0, 0.01, 0.5, 1.0, None]),
        st.floats(0.0, 5.0),
    ),
    max_size=100,
)


@given(EVENTS, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([None, 50.0]))
def test_the_bounds_hold_over_any_traffic(
    events: list[tuple[str, int, int, float | None, float]], share: float, rate: float | None
) -> None:
    """Probation stays in its share and is the sum of what is unproven; writes stay at the rate."""
    settings = AdmissionSettings(1000, probation_share=share, write_bytes_per_s=rate, num_sights=8)
    admission = AdmissionPolicy(settings)
    unproven: dict[int, int] = {}
    now_s = 0.0
    written = largest = 0
    for what, block, num_bytes, free_share, pause_s in events:
        now_s += pause_s
        if what != "drop":
            admission.seen(block)
        else:
            admission.dropped(block)
        unproven.pop(block, None)
        if what == "store":
            reason = admission.admit(block, now_s, num_bytes=num_bytes, free_share=free_share)
            written += num_bytes if reason.is_admitted else 0
            largest = max(largest, num_bytes)
            if reason is AdmitReason.PROBATION:
                unproven[block] = num_bytes

        assert admission.probation_bytes == sum(unproven.values()) <= share * 1000
        if rate is not None:
            assert written <= rate * (now_s + settings.write_burst_s) + largest


class Node:
    """A host pool under LRU, and below it a disk under S3-FIFO that is written at once."""

    def __init__(self, *, pool_blocks: int, disk_blocks: int) -> None:
        self.admission = AdmissionPolicy(
            AdmissionSettings(disk_blocks * BLOCK_BYTES, num_sights=disk_blocks, seed=1)
        )
        self.pool: OrderedDict[int, None] = OrderedDict()
        self.pool_blocks = pool_blocks
        self.disk: dict[int, int] = {}
        self.free = list(range(disk_blocks))
        self.disk_blocks = disk_blocks
        self.blocks = [0] * disk_blocks
        self.policy = S3FifoPolicy(disk_blocks)
        self.num_written = self.num_from_disk = self.num_from_pool = 0

    def ask(self, block: int) -> None:
        """An engine wants a block, and computes and stores it if it is nowhere."""
        self.admission.seen(block)
        if block in self.pool:
            self.num_from_pool += 1
            self.pool.move_to_end(block)
            return
        self.pool[block] = None
        if len(self.pool) > self.pool_blocks:
            self.pool.popitem(last=False)
        if block in self.disk:
            self.num_from_disk += 1
            self.policy.used(self.disk[block])
        elif self.admission.admit(
            block, 0.0, num_bytes=BLOCK_BYTES, free_share=len(self.free) / self.disk_blocks
        ).is_admitted:
            self._write(block)

    def _write(self, block: int) -> None:
        if not self.free:
            (slot,) = self.policy.victims(1, lambda _: True)
            self.policy.removed(slot)
            self.admission.dropped(self.blocks[slot])
            del self.disk[self.blocks[slot]]
            self.free.append(slot)
        slot = self.free.pop()
        self.disk[block], self.blocks[slot] = slot, block
        self.policy.added(slot, block)
        self.num_written += 1


def fresh_blocks(seed: int, num_blocks: int) -> list[int]:
    chance = Random(seed)
    return [chance.getrandbits(64) for _ in range(num_blocks)]


def test_a_working_set_is_served_on_its_second_pass() -> None:
    """Ten times the pool, replayed: nearly every block comes from the disk the second time."""
    node = Node(pool_blocks=400, disk_blocks=8000)
    working_set = fresh_blocks(1, 4000)
    for block in working_set:
        node.ask(block)
    for block in working_set:
        node.ask(block)
    share = node.num_from_disk / len(working_set)
    print(f"second pass: {share:.1%} from disk, {node.num_written} of 8000 blocks written")

    assert share >= 0.98


def test_a_working_set_above_probation_is_served_on_its_third_pass() -> None:
    """What was turned away at first sight is written at the second, and served from then on."""
    node = Node(pool_blocks=400, disk_blocks=4400)
    working_set = fresh_blocks(2, 4000)
    shares = []
    for _ in range(3):
        before = node.num_from_disk
        for block in working_set:
            node.ask(block)
        shares.append((node.num_from_disk - before) / len(working_set))
    print("passes over 0.9 of the disk: " + ", ".join(f"{share:.1%}" for share in shares))

    assert shares[2] >= 0.98


@pytest.mark.parametrize("is_full", [False, True])
def test_traffic_without_reuse_is_written_up_to_probation(is_full: bool) -> None:
    """Ten times the disk of blocks that nobody asks for again write half of it, and no more."""
    node = Node(pool_blocks=200, disk_blocks=4000)
    hot = fresh_blocks(3, 4000 if is_full else 0)
    for _ in range(4):
        for block in hot:
            node.ask(block)
    written_before = node.num_written
    for block in fresh_blocks(4, 40_000):
        node.ask(block)
    written = node.num_written - written_before
    kept = sum(block in node.disk for block in hot)
    print(f"disk full before: {is_full}; written {written} of 40000, kept {kept} of {len(hot)}")

    # Half of the disk, and what the sketch takes for seen before.
    assert written <= 0.5 * 4000 + 0.005 * 40_000
    assert kept >= 0.95 * len(hot)


def test_a_hot_set_is_served_beside_traffic_without_reuse() -> None:
    """Where half of the traffic never comes back, what does come back is on the disk."""
    node = Node(pool_blocks=200, disk_blocks=4000)
    hot, noise, chance = fresh_blocks(5, 2000), iter(fresh_blocks(6, 60_000)), Random(7)
    for _ in range(30_000):
        node.ask(chance.choice(hot))
        node.ask(next(noise))
    before, num_pool = node.num_from_disk, node.num_from_pool
    for _ in range(10_000):
        node.ask(chance.choice(hot))
        node.ask(next(noise))
    share = (node.num_from_disk - before + node.num_from_pool - num_pool) / 10_000
    print(f"hot set of half the disk beside noise: {share:.1%} served, {node.num_written} written")

    assert share >= 0.98
