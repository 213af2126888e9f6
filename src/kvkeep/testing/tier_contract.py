"""What every ``Tier`` promises, as tests to inherit; also for tiers that others write.

class TestMyTier(TierContract):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = MyTier(value_bytes_max=VALUE_BYTES)
        yield tier
        tier.close()

The tier must have room for ``NUM_VALUES`` values of ``VALUE_BYTES`` at least.
"""

import threading
from collections.abc import Sequence
from random import Random

import pytest

from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.tiers.base import Gauges, Lists, Parts, Probes, Registers, Tier

VALUE_BYTES = 200_000
"""Larger than one page, no multiple of one, and of several network packets."""
NUM_VALUES = 64
NUM_THREADS = 4


def block_key(number: int, *, namespace: int = 1, group_idx: int = 0) -> BlockKey:
    """Return a key; different numbers, different keys."""
    return BlockKey(
        Namespace(namespace.to_bytes(32, "big")), BlockHash(number.to_bytes(32, "big")), group_idx
    )


def value_bytes(number: int, length: int = VALUE_BYTES) -> bytes:
    """Return bytes that no other number has."""
    return Random(number).randbytes(length)


def in_parts(value: bytes | bytearray, *cuts: int) -> Parts:
    """Cut a value at these offsets."""
    whole = memoryview(value)
    ends = [*cuts, len(whole)]
    return [whole[start:end] for start, end in zip([0, *cuts], ends, strict=True)]


def write(tier: Tier, numbers: Sequence[int], length: int = VALUE_BYTES) -> list[bool]:
    """Write the values of these numbers under their keys, in two parts each."""
    values = [in_parts(value_bytes(number, length), length // 3) for number in numbers]
    return tier.write([block_key(number) for number in numbers], values)


def read(tier: Tier, keys: Sequence[BlockKey], room: int = VALUE_BYTES) -> list[bytes | None]:
    """Read values into room of two parts, cut elsewhere than they were written."""
    rooms = [bytearray(room) for _ in keys]
    lengths = tier.read(keys, [in_parts(into, room // 2) for into in rooms])
    return [
        None if length is None else bytes(into[:length])
        for into, length in zip(rooms, lengths, strict=True)
    ]


class TierContract:
    """Inherit, and give a ``tier`` that holds nothing yet."""

    @pytest.fixture
    def tier(self) -> Tier:
        """Return the tier under test."""
        raise NotImplementedError("a subclass of TierContract gives the fixture `tier`")

    def test_it_has_a_name(self, tier: Tier) -> None:
        """Metrics and messages need a label: a short word."""
        assert tier.name.isidentifier()

    def test_what_was_written_is_read(self, tier: Tier) -> None:
        """All bytes of each value come back under its key, whatever the pieces."""
        assert write(tier, range(8)) == [True] * 8

        found = read(tier, [block_key(number) for number in reversed(range(8))])

        assert found == [value_bytes(number) for number in reversed(range(8))]

    def test_nothing_is_found_under_another_key(self, tier: Tier) -> None:
        """Another namespace, hash or group is another block."""
        write(tier, [1])
        others = [block_key(2), block_key(1, namespace=2), block_key(1, group_idx=1)]

        assert read(tier, others) == [None] * 3

    def test_a_batch_is_answered_one_by_one(self, tier: Tier) -> None:
        """Misses between hits are misses, and the hits are hits."""
        write(tier, [1, 3])

        found = read(tier, [block_key(number) for number in range(5)])

        assert found == [None, value_bytes(1), None, value_bytes(3), None]

    def test_an_empty_batch_does_nothing(self, tier: Tier) -> None:
        """No keys, no answers, no error."""
        assert tier.write([], []) == []
        assert tier.read([], []) == []
        tier.delete([])

    @pytest.mark.parametrize("length", [1, 4096, VALUE_BYTES - 1])
    def test_a_short_value_keeps_its_length(self, tier: Tier, length: int) -> None:
        """A value shorter than the room for it comes back with its own length."""
        assert write(tier, [1], length) == [True]

        assert read(tier, [block_key(1)]) == [value_bytes(1, length)]

    def test_a_value_without_room_is_a_miss(self, tier: Tier) -> None:
        """Half a value is none, and the room next to it is not touched."""
        write(tier, [1])
        beyond = bytearray(b"\x5a" * VALUE_BYTES)

        assert tier.read([block_key(1)], [[memoryview(beyond)[: VALUE_BYTES - 1]]]) == [None]

        assert beyond[-1] == 0x5A

    def test_written_twice_is_there(self, tier: Tier) -> None:
        """The same value again is no error and changes nothing."""
        write(tier, [1])
        assert write(tier, [1]) == [True]

        assert read(tier, [block_key(1)]) == [value_bytes(1)]

    def test_a_deleted_value_is_gone(self, tier: Tier) -> None:
        """And only that; deleting what is not there is no error."""
        write(tier, [1, 2])
        tier.delete([block_key(1), block_key(3)])

        assert read(tier, [block_key(1), block_key(2)]) == [None, value_bytes(2)]

    def test_a_deleted_value_can_be_written_again(self, tier: Tier) -> None:
        """A block that was rotten comes back whole."""
        write(tier, [1])
        tier.delete([block_key(1)])
        assert write(tier, [1]) == [True]

        assert read(tier, [block_key(1)]) == [value_bytes(1)]

    def test_the_caller_may_reuse_its_memory(self, tier: Tier) -> None:
        """Once a write has returned its bytes are the tier's own."""
        memory = bytearray(value_bytes(1))
        tier.write([block_key(1)], [in_parts(memory)])
        memory[:] = bytes(len(memory))

        assert read(tier, [block_key(1)]) == [value_bytes(1)]

    def test_it_holds_what_was_agreed(self, tier: Tier) -> None:
        """Room for the values of this contract, all at once."""
        for start in range(0, NUM_VALUES, 8):
            assert write(tier, range(start, start + 8)) == [True] * 8

        found = read(tier, [block_key(number) for number in range(NUM_VALUES)])
        assert found == [value_bytes(number) for number in range(NUM_VALUES)]

    def test_several_threads_use_it_at_once(self, tier: Tier) -> None:
        """Each finds its own values while others write, read and delete theirs."""
        wrong: list[str] = []

        def work(first: int) -> None:
            mine = range(first * 10, first * 10 + 8)
            for _ in range(3):
                if write(tier, mine) != [True] * 8:
                    wrong.append(f"thread {first} could not write")
                found = read(tier, [block_key(number) for number in mine])
                if found != [value_bytes(number) for number in mine]:
                    wrong.append(f"thread {first} read something else")
                tier.delete([block_key(number) for number in mine])

        threads = [threading.Thread(target=work, args=(n,)) for n in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert wrong == []

    def test_a_probe_agrees_with_a_read(self, tier: Tier) -> None:
        """Where a tier can tell beforehand, what it tells is true."""
        write(tier, [1, 2])
        tier.delete([block_key(2)])
        if isinstance(tier, Probes):
            assert tier.lookup([block_key(n) for n in (1, 2, 3)]) == [True, False, False]
            assert tier.lookup([]) == []

    def test_a_list_has_every_key_once(self, tier: Tier) -> None:
        """Where a tier knows its keys, it knows each with namespace, hash and group."""
        write(tier, [1, 2, 3])
        tier.write([block_key(1, namespace=2, group_idx=7)], [in_parts(value_bytes(9))])
        tier.delete([block_key(2)])
        if isinstance(tier, Lists):
            found = sorted(tier.keys(), key=repr)
            wanted = [block_key(1), block_key(3), block_key(1, namespace=2, group_idx=7)]
            assert found == sorted(wanted, key=repr)

    def test_a_gauge_counts(self, tier: Tier) -> None:
        """Where a tier knows how full it is, values and bytes go up and down with it."""
        if not isinstance(tier, Gauges):
            return
        before = tier.use()
        write(tier, [1, 2])
        between = tier.use()
        tier.delete([block_key(1), block_key(2)])
        after = tier.use()

        assert between.num_values == before.num_values + 2
        assert between.used_bytes >= before.used_bytes + 2 * VALUE_BYTES
        assert (after.num_values, after.used_bytes) == (before.num_values, before.used_bytes)

    def test_registered_memory_works_like_any_other(self, tier: Tier) -> None:
        """Where a tier takes memory beforehand, the bytes are the same."""
        if not isinstance(tier, Registers):
            return
        import mmap

        region = mmap.mmap(-1, 2 << 20)
        window = memoryview(region)
        tier.register(window)
        window[:VALUE_BYTES] = value_bytes(5)
        source, target = window[:VALUE_BYTES], window[1 << 20 : (1 << 20) + VALUE_BYTES]

        assert tier.write([block_key(5)], [[source]]) == [True]
        assert tier.read([block_key(5)], [[target]]) == [VALUE_BYTES]
        assert bytes(target) == value_bytes(5)
