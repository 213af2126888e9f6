"""The index against a naive model of engines; and that no news, true or not, makes it grow."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeep.router.events.block_events import (
    AllBlocksCleared,
    BlockEvent,
    BlockRemoved,
    BlockStored,
    Hash,
)
from kvkeep.router.prefix_hashes import token_hashes, token_root
from kvkeep.router.prefix_index import PrefixIndex

BLOCK_TOKENS = 2
BYTES_PER_BLOCK_AND_ENGINE = 256


def stored(hashes: Sequence[Hash], tokens: list[int], parent: Hash | None = None) -> BlockStored:
    return BlockStored(list(hashes), tokens, BLOCK_TOKENS, parent, "GPU")


def removed(hashes: Sequence[Hash]) -> BlockRemoved:
    return BlockRemoved(list(hashes), "GPU")


@dataclass
class NaiveEngine:
    """Stores and removes blocks, and tells so; every copy of a block is told by itself."""

    seed: int
    copies: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def hash_of(self, tokens: tuple[int, ...]) -> int:
        # Like an engine's: 64 bits that nobody else can work out.
        return Random(f"{self.seed} {tokens}").getrandbits(64)

    def store(self, tokens: tuple[int, ...], *, is_anew: bool) -> Iterator[BlockEvent]:
        """Store what is missing; or everything, as two requests do that are computed at once."""
        ends = range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
        first = next((end for end in ends if is_anew or not self.copies[tokens[:end]]), None)
        if first is None:
            return
        new = [tokens[:end] for end in ends if end >= first]
        self.copies.update(new)
        parent = tokens[: first - BLOCK_TOKENS]
        yield stored(
            [self.hash_of(prefix) for prefix in new],
            list(tokens[first - BLOCK_TOKENS : ends[-1]]),
            self.hash_of(parent) if parent else None,
        )

    def remove(self, chance: Random) -> Iterator[BlockEvent]:
        held = sorted(self.copies)
        if held:
            # An engine frees the ends of sequences first.
            tokens = chance.choice(held)
            gone = [other for other in held if other[: len(tokens)] == tokens]
            for other in gone:
                self.copies[other] -= 1
                if not self.copies[other]:
                    del self.copies[other]
            yield removed([self.hash_of(other) for other in gone])

    def clear(self) -> Iterator[BlockEvent]:
        self.copies.clear()
        yield AllBlocksCleared()

    def depth(self, tokens: tuple[int, ...]) -> int:
        ends = range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
        return next(
            (idx for idx, end in enumerate(ends) if not self.copies[tokens[:end]]), len(ends)
        )


KINDS = ["store", "store", "store anew", "remove", "remove", "clear"]
prompts = st.lists(st.integers(0, 1), min_size=2, max_size=10).map(tuple)
steps = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(KINDS), prompts),
    max_size=30,
)


@given(steps=steps, asked=prompts, chance=st.randoms(use_true_random=False))
def test_events_are_followed_exactly(
    steps: list[tuple[int, str, tuple[int, ...]]], asked: tuple[int, ...], chance: Random
) -> None:
    """After any history of stores, removals and resets, the index knows what each engine holds."""
    engines = {f"engine-{idx}": NaiveEngine(idx) for idx in range(3)}
    index = PrefixIndex(BLOCK_TOKENS)
    for idx, what, tokens in steps:
        name = f"engine-{idx}"
        engine = engines[name]
        match what:
            case "remove":
                told = engine.remove(chance)
            case "clear":
                told = engine.clear()
            case _:
                told = engine.store(tokens, is_anew=what == "store anew")
        for event in told:
            index.apply(name, event)
        index.check()
    prefix = token_hashes(asked, BLOCK_TOKENS, token_root())

    assert index.match(prefix, list(engines)) == [each.depth(asked) for each in engines.values()]
    assert index.num_orphans == index.num_refused == 0


@example(
    sent=[(0, (0, 0, 0, 0)), (0, (0, 0, 0, 0, 0, 0))], blocks_max=2, said=[0] * 30
)  # A prompt longer than the cap, of which less was held than believed.
@given(
    sent=st.lists(st.tuples(st.integers(0, 2), prompts), max_size=30),
    blocks_max=st.integers(1, 8),
    said=st.lists(st.integers(0, 5), min_size=30, max_size=30),
)
def test_assumptions_stay_within_the_cap(
    sent: list[tuple[int, tuple[int, ...]]], blocks_max: int, said: list[int]
) -> None:
    """However small the cap and whatever responses claim, tables agree and the cap holds."""
    index = PrefixIndex(BLOCK_TOKENS, blocks_max)
    for (idx, tokens), reported in zip(sent, said, strict=False):
        name = f"engine-{idx}"
        prefix = token_hashes(tokens, BLOCK_TOKENS, token_root())
        (expected,) = index.match(prefix, [name])
        index.assume(name, prefix)
        index.check()
        index.correct(name, prefix, expected, reported if reported < 5 else None)
        index.check()

        assert len(index) <= blocks_max


hashes = st.integers(0, 6) | st.binary(max_size=9)
hostile_events = st.one_of(
    st.builds(
        BlockStored,
        block_hashes=st.lists(hashes, max_size=4),
        token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=8),
        block_tokens=st.integers(1, 3),
        parent_block_hash=st.none() | hashes,
        medium=st.sampled_from([None, "GPU", "CPU"]),
        lora_name=st.sampled_from([None, "", "lora"]),
        extra_keys=st.none() | st.lists(st.none() | st.lists(st.text(max_size=2) | st.none())),
        group_idx=st.sampled_from([None, 0, 1]),
    ),
    st.builds(BlockRemoved, block_hashes=st.lists(hashes, max_size=4), medium=st.none()),
    st.builds(AllBlocksCleared),
)


@example(told=[(0, stored([1], [0, 0])), (0, stored([1], [1, 1]))], sent=[])  # One name for two ...
@example(told=[(0, stored([1, 1], [0, 0, 0, 0]))], sent=[])  # ... and both at once.
@given(
    told=st.lists(st.tuples(st.integers(0, 2), hostile_events), max_size=40),
    sent=st.lists(prompts, max_size=5),
)
def test_no_event_breaks_the_tables(
    told: list[tuple[int, BlockEvent]], sent: list[tuple[int, ...]]
) -> None:
    """Events that contradict each other leave tables that agree, and leaving empties them."""
    index = PrefixIndex(BLOCK_TOKENS, 6)
    for number, (idx, event) in enumerate(told):
        index.apply(f"engine-{idx}", event)
        if number < len(sent):
            index.assume("engine-0", token_hashes(sent[number], BLOCK_TOKENS, token_root()))
        index.check()
    for idx in range(3):
        index.drop(f"engine-{idx}")

    assert len(index) == 0


@pytest.mark.parametrize("has_events", [True, False], ids=["events", "assumed"])
@pytest.mark.parametrize("num_engines", [1, 3, 8])
@settings(max_examples=1)
@given(chance=st.just(Random(3)))
def test_memory_is_bounded(num_engines: int, has_events: bool, chance: Random) -> None:
    """At the cap and under churn, a block known of an engine takes at most 256 bytes."""
    index = PrefixIndex(BLOCK_TOKENS, 5 << 10)
    held: dict[str, list[int]] = {f"engine-{idx}": [] for idx in range(num_engines)}
    for number in range(9000):
        name = f"engine-{number % num_engines}"
        tokens = [chance.getrandbits(20) for _ in range(4 * BLOCK_TOKENS)]
        if has_events:
            new = [chance.getrandbits(64) for _ in range(4)]
            index.apply(name, stored(new, tokens))
            held[name] += new
            if len(held[name]) > index.blocks_max // num_engines:
                index.apply(name, removed(held[name][:4]))
                del held[name][:4]
        else:
            index.assume(name, token_hashes(tokens, BLOCK_TOKENS, token_root()))
        if number > 5000 and number % 500 == 0:
            num_known = sum(index.num_blocks(each) for each in held)

            assert num_known > 0.9 * index.blocks_max
            assert footprint(index) <= BYTES_PER_BLOCK_AND_ENGINE * num_known


def footprint(index: PrefixIndex) -> int:
    """Bytes of everything that can be reached from an index, each object once."""
    seen: set[int] = set()
    waiting: list[object] = [index]
    total = 0
    while waiting:
        item = waiting.pop()
        if id(item) in seen or (isinstance(item, int) and -6 < item < 257):
            continue
        seen.add(id(item))
        # The allocator rounds up to 16.
        total += (sys.getsizeof(item) + 15) // 16 * 16
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif hasattr(item, "__slots__"):
            waiting += [getattr(item, name) for name in item.__slots__]
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
    return total
