"""The table of a holder's names for blocks: copies count, and what is forgotten is told."""

import pytest

from kvkeep.router.events.named_blocks import FORGOTTEN_AT_ONCE, NamedBlocks


@pytest.fixture
def names() -> NamedBlocks:
    """A table that knows block 10 by the name 1, and twice block 20 by the name 2."""
    names = NamedBlocks()
    assert names.store([1, 2, 2], [10, 20, 20]) == []
    return names


def test_a_block_is_known_by_its_name(names: NamedBlocks) -> None:
    """Copies are no further names, and an unheard name stands for nothing."""
    assert [names.block_of(name) for name in (1, 2, 3)] == [10, 20, None]
    assert len(names) == 2


def test_each_copy_is_removed_by_itself(names: NamedBlocks) -> None:
    """The name is known until the last of them; what nobody has heard is nothing."""
    names.store([2], [20])
    seen = []
    for _ in range(4):
        seen.append((names.remove([2]), names.block_of(2)))
        names.check()

    assert seen == [(([], [20]), 20), (([], [20]), 20), (([20], []), None), (([], []), None)]


def test_several_are_removed_at_once(names: NamedBlocks) -> None:
    """The same as one after the other, though one is named twice."""
    assert names.remove([2, 1, 2, 3]) == ([10, 20], [20])
    assert len(names) == 0


def test_a_name_that_is_given_anew_stands_for_the_later_block(names: NamedBlocks) -> None:
    """The earlier one is told gone as often as it was held, and none of its copies count."""
    assert names.store([2, 2], [21, 21]) == [20, 20]
    names.check()

    assert [names.remove([2]) for _ in range(3)] == [([], [21]), ([21], []), ([], [])]


def test_the_oldest_names_make_room(names: NamedBlocks) -> None:
    """With their copies; where there is room nothing goes."""
    names.store([3], [30])
    assert names.forget_oldest(3) == []
    assert names.forget_oldest(1) == [10, 20, 20]
    names.check()

    assert (len(names), names.block_of(3)) == (1, 30)


def test_a_full_table_makes_room_for_more_than_one() -> None:
    """So that the next name of thousands has not to look for the oldest again."""
    names = NamedBlocks()
    room = 3 * FORGOTTEN_AT_ONCE
    names.store(range(room + 1), range(room + 1))

    assert names.forget_oldest(room) == [0, 1, 2, 3]
    assert len(names) == room - 3


def test_what_is_cleared_is_told(names: NamedBlocks) -> None:
    """Each block as often as it was held; nothing is known afterwards."""
    assert names.clear() == [10, 20, 20]
    names.check()

    assert (len(names), names.remove([2]), names.clear()) == (0, ([], []), [])
