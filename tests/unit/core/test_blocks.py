"""The ledger's own moves; sequences of them are in tests/property/test_ledger.py."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from kvkeep.core.blocks import STORY_MOVES_MAX, TRANSITIONS, BlockLedger, BlockState, Move, Slot
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.model.errors import InvariantError
from kvkeep.model.ids import BlockHash, BlockKey, Namespace

NAMESPACE = Namespace(b"n" * 32)
KEYS = [BlockKey(NAMESPACE, BlockHash(bytes([idx]) * 32)) for idx in range(8)]


def ledger(num_slots: int = 4, num_ready: int = 0, num_heads: int = 1) -> BlockLedger:
    made = BlockLedger(num_slots, num_heads, LruPolicy())
    for key in KEYS[:num_ready]:
        slot = made.begin_write(key)
        assert slot is not None
        assert made.finish_heads(slot, made.all_heads)
    return made


def found(blocks: BlockLedger, *keys: BlockKey) -> list[int]:
    hashes = [key.block_hash for key in keys]
    return [slot.idx for slot in blocks.readable_prefix(NAMESPACE, 0, hashes)]


@pytest.mark.parametrize(
    ("state", "move"),
    [
        (state, move)
        for state, move in itertools.product(BlockState, Move)
        if move not in TRANSITIONS[state]
    ],
)
def test_an_illegal_move_tells_the_story(state: BlockState, move: Move) -> None:
    """A move that the table does not have is refused, and the slot stays as it was."""
    slot = Slot(3)
    slot.state = state
    slot.story.append(Move.WRITE_BEGUN)
    with pytest.raises(InvariantError, match=r"slot=3 .*story=\[write begun\]"):
        slot.move(move)

    assert slot.state is state


def test_a_story_is_short() -> None:
    """A slot remembers its last moves only."""
    slot = Slot(0)
    for _ in range(STORY_MOVES_MAX):
        slot.move(Move.WRITE_BEGUN)
        slot.move(Move.WRITE_FAILED)

    assert len(slot.story) == STORY_MOVES_MAX


def test_a_prefix_ends_at_the_first_gap() -> None:
    """Blocks behind one that is missing or still being written are not readable."""
    blocks = ledger(num_ready=2)
    blocks.begin_write(KEYS[2])

    assert found(blocks, *KEYS[:4]) == [0, 1]
    assert found(blocks, KEYS[3], *KEYS[:2]) == []
    assert found(blocks, KEYS[1]) == [1]
    blocks.check()


def test_namespaces_and_groups_do_not_meet() -> None:
    """A block is only found under its own namespace and group."""
    blocks = ledger(num_ready=1)
    hashes = [KEYS[0].block_hash]

    assert blocks.readable_prefix(Namespace(b"o" * 32), 0, hashes) == []
    assert blocks.readable_prefix(NAMESPACE, 1, hashes) == []


def test_a_block_is_ready_with_its_last_head() -> None:
    """Heads may come in any order; only the last makes the block readable."""
    blocks = ledger(num_heads=3)
    slot = blocks.begin_write(KEYS[0])
    assert slot is not None

    assert not blocks.finish_heads(slot, 0b100)
    assert not blocks.finish_heads(slot, 0b001)
    assert found(blocks, KEYS[0]) == []
    assert blocks.finish_heads(slot, 0b010)
    assert found(blocks, KEYS[0]) == [0]
    blocks.check()


def test_a_full_pool_grants_nothing() -> None:
    """Without a free slot no write begins and nothing changes."""
    blocks = ledger(num_slots=2, num_ready=2)

    assert blocks.begin_write(KEYS[5]) is None
    assert blocks.find(KEYS[5]) is None
    blocks.check()


def test_eviction_passes_over_lent_blocks() -> None:
    """A pinned block stays, however old; the oldest other one goes."""
    blocks = ledger(num_slots=3, num_ready=3)
    blocks.pin([blocks.slots[0]])

    assert [slot.idx for slot in blocks.evict(1, NAMESPACE)] == [1]
    assert [slot.idx for slot in blocks.evict(5, NAMESPACE)] == [2]
    assert found(blocks, KEYS[0]) == [0]
    assert blocks.num_evicted == 2
    blocks.check()


def test_a_prefix_loses_its_tail_first() -> None:
    """After a read the last block of a sequence is older than the first."""
    blocks = ledger(num_slots=3, num_ready=3)
    blocks.pin(blocks.slots)
    blocks.unpin(blocks.slots)

    assert [slot.idx for slot in blocks.evict(2, NAMESPACE)] == [2, 1]


def test_a_doomed_block_goes_with_its_last_reader() -> None:
    """Nobody new finds it, who reads it reads on, and then its slot is free."""
    blocks = ledger(num_ready=1)
    slot = blocks.slots[0]
    blocks.pin([slot])
    blocks.pin([slot])

    assert not blocks.doom(slot)
    assert found(blocks, KEYS[0]) == []
    assert blocks.unpin([slot]) == []
    assert blocks.unpin([slot]) == [slot]
    assert blocks.num_free == 4
    blocks.check()


def test_a_fenced_slot_is_out_of_reach() -> None:
    """Its block may be written anew elsewhere, its slot only after the fence is lifted."""
    blocks = ledger(num_slots=2)
    slot = blocks.begin_write(KEYS[0])
    assert slot is not None
    blocks.fence(slot)
    again = blocks.begin_write(KEYS[0])

    assert again is not None
    assert again is not slot
    assert blocks.num_free == 0
    blocks.unfence(slot)
    assert blocks.num_free == 1
    blocks.check()


def test_a_slot_in_use_is_never_freed() -> None:
    """Freeing a slot that somebody writes or reads is a defect and stops everything."""
    blocks = ledger()
    slot = blocks.begin_write(KEYS[0])
    assert slot is not None
    slot.num_writers = 1

    with pytest.raises(InvariantError, match="in use"):
        blocks.fail_write(slot)


def test_one_block_is_recovered_once() -> None:
    """Of two slots that claim the same block the first is taken, the other stays free."""
    blocks = ledger()

    assert blocks.recover(KEYS[0], 2)
    assert not blocks.recover(KEYS[0], 3)
    assert found(blocks, KEYS[0]) == [2]
    assert blocks.num_free == 3
    blocks.check()


def test_a_slot_is_recovered_once() -> None:
    """A second block for the same slot is a defect of the recovery."""
    blocks = ledger()
    blocks.recover(KEYS[0], 2)

    with pytest.raises(InvariantError, match="recovered"):
        blocks.recover(KEYS[1], 2)
    with pytest.raises(InvariantError, match="recovered"):
        blocks.recover_writing(2)


DAMAGE: dict[str, Callable[[Any], object]] = {
    "free list": lambda blocks: blocks._free.popitem(),
    "index": lambda blocks: blocks._spaces.clear(),
    "key": lambda blocks: setattr(blocks.slots[0], "key", KEYS[7]),
    "lent without bytes": lambda blocks: setattr(blocks.slots[3], "num_pins", 1),
    "policy": lambda blocks: blocks.accounts.others.policy.removed(0),
    "count": lambda blocks: blocks.num_by_state.update({BlockState.READY: 9}),
    "pins": lambda blocks: setattr(blocks.slots[0], "num_pins", -1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_check_finds_damage(name: str) -> None:
    """Every invariant that the ledger states is one that its check can find broken."""
    blocks = ledger(num_ready=2)
    blocks.check()
    DAMAGE[name](blocks)

    with pytest.raises(InvariantError):
        blocks.check()


class CountedBytes(bytes):
    """A name that counts how often it is hashed or compared."""

    steps = 0

    def __hash__(self) -> int:
        """As bytes do."""
        CountedBytes.steps += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        """As bytes do."""
        CountedBytes.steps += 1
        return super().__eq__(other)


@pytest.mark.parametrize("num_stored", [0, 1, 5, 8])
def test_a_miss_takes_as_many_steps_whatever_others_stored(num_stored: int) -> None:
    """Of a prompt that another tenant has, in part or whole, a lookup says and costs nothing."""
    blocks = ledger(num_slots=16, num_heads=1)
    for stored in KEYS[:num_stored]:
        blocks.finish_heads(begun(blocks, stored), 1)
    mine = Namespace(CountedBytes(b"m" * 32))
    own = BlockKey(mine, BlockHash(b"o" * 32))
    blocks.finish_heads(begun(blocks, own), 1)
    asked = [BlockHash(CountedBytes(stored.block_hash)) for stored in KEYS]
    CountedBytes.steps = 0

    assert blocks.readable_prefix(Namespace(CountedBytes(mine)), 0, asked) == []
    assert CountedBytes.steps == STEPS_OF_A_MISS


STEPS_OF_A_MISS = 3
"""The namespace is hashed and compared, and the first hash is hashed."""


def begun(blocks: BlockLedger, stored: BlockKey) -> Slot:
    """A slot for a block."""
    slot = blocks.begin_write(stored)
    assert slot is not None
    return slot
