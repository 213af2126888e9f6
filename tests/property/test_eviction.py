"""S3-FIFO against a naive model, against scans, and what becomes of prefixes."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.eviction.s3fifo import USES_MAX, S3FifoPolicy

NUM_SLOTS = 8


def everything(_slot: int) -> bool:
    return True


class NaiveS3Fifo:
    """The paper's algorithm as written: one eviction at a time, everything moved at once."""

    def __init__(self, num_slots: int, small_share: float) -> None:
        self.small_share = small_share
        self.small: list[int] = []
        self.main: list[int] = []
        self.uses: dict[int, int] = {}
        self.blocks: dict[int, int] = {}
        self.ghost: list[int] = []
        self.ghost_max = max(1, round((1 - small_share) * num_slots))

    def add(self, slot: int, fingerprint: int) -> None:
        self.blocks[slot] = fingerprint
        self.uses[slot] = 0
        if fingerprint in self.ghost:
            self.ghost.remove(fingerprint)
            self.main.append(slot)
        else:
            self.small.append(slot)

    def use(self, slot: int) -> None:
        self.uses[slot] = min(USES_MAX, self.uses[slot] + 1)

    def evict(self, lent: list[int]) -> int | None:
        while True:
            small = [slot for slot in self.small if slot not in lent]
            main = [slot for slot in self.main if slot not in lent]
            if not small and not main:
                return None
            if small and (len(self.small) > self.small_share * len(self.blocks) or not main):
                slot = small[0]
                if not self.uses[slot]:
                    self.ghost = [*self.ghost, self.blocks[slot]][-self.ghost_max :]
                    self.forget(slot)
                    return slot
                self.uses[slot] = 0
                self.small.remove(slot)
            else:
                slot = main[0]
                if not self.uses[slot]:
                    self.forget(slot)
                    return slot
                self.uses[slot] -= 1
                self.main.remove(slot)
            self.main.append(slot)

    def forget(self, slot: int) -> None:
        (self.small if slot in self.small else self.main).remove(slot)
        del self.uses[slot], self.blocks[slot]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 14)),
        st.tuples(st.just("use"), st.integers(0, NUM_SLOTS - 1)),
        st.tuples(st.just("delete"), st.integers(0, NUM_SLOTS - 1)),
        st.tuples(st.just("evict"), st.integers(1, 4)),
        st.tuples(st.just("lend"), st.integers(0, NUM_SLOTS - 1)),
        st.tuples(st.just("ask"), st.integers(0, NUM_SLOTS)),
    ),
    max_size=60,
)


@given(STEPS, st.sampled_from([0.1, 0.25, 0.5]))
def test_lazy_moves_are_those_of_the_paper(steps: list[tuple[str, int]], share: float) -> None:
    """Whatever came before, the victims are those of moving everything at once, in that order."""
    policy, model = S3FifoPolicy(NUM_SLOTS, small_share=share), NaiveS3Fifo(NUM_SLOTS, share)
    lent: list[int] = []

    def is_evictable(slot: int) -> bool:
        return slot not in lent

    for what, number in steps:
        if what == "add" and len(model.blocks) < NUM_SLOTS:
            slot = min(set(range(NUM_SLOTS)) - set(model.blocks))
            if number not in model.blocks.values():
                policy.added(slot, number)
                model.add(slot, number)
        elif what == "use" and number in model.blocks:
            policy.used(number)
            model.use(number)
        elif what == "delete" and number in model.blocks and number not in lent:
            policy.victims(0, everything)  # a deletion comes with no walk before it
            policy.removed(number)
            model.forget(number)
        elif what == "lend":
            lent[:] = [number] if number not in lent else []
        elif what == "ask":
            policy.victims(number, everything)
        elif what == "evict":
            named = policy.victims(number, is_evictable)
            assert named == policy.victims(number, is_evictable)
            for slot in named:
                policy.removed(slot)
            expected = [model.evict(lent) for _ in range(number)]
            assert named == [slot for slot in expected if slot is not None]

    assert sorted(policy.victims(99, everything)) == sorted(model.blocks)
    assert len(policy._ghost) <= model.ghost_max


@given(STEPS, st.integers(1, NUM_SLOTS))
def test_victims_go_in_the_order_they_were_named(steps: list[tuple[str, int]], num: int) -> None:
    """Emptying one slot after another chooses the same as asking for all of them at once."""
    policy = S3FifoPolicy(NUM_SLOTS)
    for slot in range(NUM_SLOTS):
        policy.added(slot, slot)
    for what, number in steps:
        if what == "use":
            policy.used(number)
    at_once = policy.victims(num, everything)
    for expected in at_once:
        assert policy.victims(1, everything) == [expected]
        policy.removed(expected)


class Pool:
    """Blocks by name in a pool of a fixed size, as the ledger drives a policy."""

    def __init__(self, policy: EvictionPolicy, num_slots: int) -> None:
        self.policy = policy
        self.slots: dict[int, int] = {}
        self.free = list(range(num_slots))
        self.names: dict[int, int] = {}

    def store(self, blocks: list[int], *, is_tail_first: bool = False) -> None:
        """Make room for those that are missing, and add them."""
        missing = [block for block in blocks if block not in self.slots]
        num_short = len(missing) - len(self.free)
        if num_short > 0:
            for slot in self.policy.victims(num_short, everything):
                self.policy.removed(slot)
                self.free.append(slot)
                del self.slots[self.names.pop(slot)]
        for block in reversed(missing) if is_tail_first else missing:
            self.slots[block] = self.free.pop()
            self.names[self.slots[block]] = block
            self.policy.added(self.slots[block], block)

    def read(self, blocks: list[int]) -> None:
        """Count a use, from the last to the first, as ``BlockLedger.unpin`` does."""
        for block in reversed(blocks):
            self.policy.used(self.slots[block])


def kept_of_hot_set(policy: EvictionPolicy, *, num_slots: int, num_hot: int) -> float:
    """Share of a hot set that is left after one scan of four times the pool."""
    pool = Pool(policy, num_slots)
    hot = list(range(num_hot))
    for start in range(0, num_hot, 20):
        pool.store(hot[start : start + 20])
    for _ in range(3):
        for start in range(0, num_hot, 20):
            pool.read(hot[start : start + 20])
    for start in range(10_000, 10_000 + 4 * num_slots, 20):
        pool.store(list(range(start, start + 20)))
    return sum(block in pool.slots for block in hot) / num_hot


@pytest.mark.parametrize("hot_share", [0.2, 0.5, 0.85])
def test_a_scan_leaves_the_hot_set(hot_share: float) -> None:
    """A scan of blocks that nobody reads again pushes out others like it, not what is read."""
    num_slots = 1000
    num_hot = int(hot_share * num_slots)
    kept = kept_of_hot_set(S3FifoPolicy(num_slots), num_slots=num_slots, num_hot=num_hot)
    kept_lru = kept_of_hot_set(LruPolicy(), num_slots=num_slots, num_hot=num_hot)
    print(f"hot set of {hot_share:.0%}: S3-FIFO keeps {kept:.1%}, LRU {kept_lru:.1%}")

    assert kept >= 0.95
    assert kept_lru <= 0.05


PREFIXES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 6), st.booleans()), min_size=1, max_size=60
)


@given(PREFIXES)
def test_of_one_store_the_tail_goes_before_the_head(requests: list[tuple[int, int, bool]]) -> None:
    """While a block is there, so are all before it that were added with it, the tail first."""
    pool = Pool(S3FifoPolicy(16), 16)
    generation: dict[int, int] = {}
    for document, length, is_read in requests:
        stored = [document * 1000 + generation.get(document, 0) * 10 + idx for idx in range(6)]
        num_here = sum(block in pool.slots for block in stored)
        assert all(block in pool.slots for block in stored[:num_here]), "a head went first"
        if is_read and num_here:
            pool.read(stored[: min(length, num_here)])
        elif not num_here:
            generation[document] = generation.get(document, 0) + 1  # never the same blocks again
            fresh = [document * 1000 + generation[document] * 10 + idx for idx in range(6)]
            pool.store(fresh, is_tail_first=True)


def unreachable_share(policy: EvictionPolicy, *, is_tail_first: bool, num_stores: int) -> float:
    """Mean share of the pool that is blocks behind a missing one of their prefix."""
    num_slots, num_blocks = 1000, 48
    pool, chance = Pool(policy, num_slots), Random(1)
    lost = num_looks = 0
    for request in range(600):
        document = request if chance.random() < 0.5 else request - chance.randrange(1, 12)
        blocks = [document * 1000 + idx for idx in range(num_blocks)]
        num_here = next((i for i, b in enumerate(blocks) if b not in pool.slots), num_blocks)
        pool.read(blocks[:num_here])
        step = num_blocks // num_stores
        for start in range(0, num_blocks, step):
            pool.store(blocks[start : start + step], is_tail_first=is_tail_first)
        if request < 100:
            continue
        num_looks += 1
        for name in sorted({block // 1000 for block in pool.slots}):
            prefix = [block in pool.slots for block in range(name * 1000, name * 1000 + num_blocks)]
            reachable = prefix.index(False) if False in prefix else num_blocks
            lost += sum(prefix) - reachable
    return lost / num_looks / num_slots


@pytest.mark.parametrize(("num_stores", "share_max"), [(1, 0.01), (4, 0.08)])
def test_few_blocks_are_unreachable(num_stores: int, share_max: float) -> None:
    """Blocks behind a hole in their prefix take little of the pool, as they leave next."""
    shares = {
        (name, is_tail_first): unreachable_share(
            S3FifoPolicy(1000) if name == "S3-FIFO" else LruPolicy(),
            is_tail_first=is_tail_first,
            num_stores=num_stores,
        )
        for name in ("S3-FIFO", "LRU")
        for is_tail_first in (False, True)
    }
    for (name, is_tail_first), share in shares.items():
        order = "tail" if is_tail_first else "head"
        print(f"{num_stores} stores a prefix, {order} added first, {name}: {share:.2%} unreachable")

    assert shares["S3-FIFO", True] <= share_max


def share_of_chats_served(policy: EvictionPolicy, *, num_chats: int, noise: float) -> float:
    """Conversations of 4 to 11 turns that each append 8 blocks, among prompts that never return."""
    pool, chance = Pool(policy, 2000), Random(1)
    chats: list[list[int]] = []  # name, blocks, turns left
    num_served = num_asked = name = 0
    for request in range(4000):
        if chance.random() < noise:
            name += 1
            pool.store([name * 1000 + idx for idx in range(40)], is_tail_first=True)
            continue
        while len(chats) < num_chats:
            name += 1
            chats.append([name, 8, chance.randrange(4, 12)])
        chat = chance.choice(chats)
        blocks = [chat[0] * 1000 + idx for idx in range(chat[1])]
        num_here = next((i for i, b in enumerate(blocks) if b not in pool.slots), len(blocks))
        if request > 1000:
            num_served += num_here
            num_asked += len(blocks) - 8
        pool.read(blocks[:num_here])
        pool.store(blocks[num_here:], is_tail_first=True)
        chat[1] += 8
        chat[2] -= 1
        if not chat[2]:
            chats.remove(chat)
    return num_served / num_asked


@pytest.mark.parametrize(("num_chats", "noise"), [(40, 0.0), (40, 0.3), (40, 0.6), (20, 0.6)])
def test_neither_policy_is_best_for_chats(num_chats: int, noise: float) -> None:
    """LRU is better for conversations alone, S3-FIFO where most prompts never return."""
    served = {
        name: share_of_chats_served(policy, num_chats=num_chats, noise=noise)
        for name, policy in (
            ("LRU", LruPolicy()),
            ("S3-FIFO", S3FifoPolicy(2000)),
            ("S3-FIFO 0.25", S3FifoPolicy(2000, small_share=0.25)),
        )
    }
    told = ", ".join(f"{name} {share:.1%}" for name, share in served.items())
    print(f"{num_chats} chats, {noise:.0%} of requests never return: {told}")

    if noise == 0.0:
        assert served["LRU"] > served["S3-FIFO 0.25"] > served["S3-FIFO"]
    if noise == 0.6:
        assert min(served["S3-FIFO"], served["S3-FIFO 0.25"]) > served["LRU"]
