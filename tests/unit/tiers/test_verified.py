"""An envelope around each value: what is not exactly what was written is a miss."""

from collections.abc import Callable, Iterator, Sequence

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.testing.tier_contract import block_key, in_parts, read, value_bytes, write
from kvkeep.tiers import memory
from kvkeep.tiers.base import Gauges, Lists, Parts, Probes, Registers
from kvkeep.tiers.faulty import FaultyTier, TierFault
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers import verified
from kvkeep.tiers.wrappers.verified import HEADER_BYTES, VerifiedTier

LENGTH = 5000


@pytest.fixture
def inner() -> MemoryTier:
    """Where the envelopes lie."""
    return MemoryTier(1 << 20)


@pytest.fixture
def tier(inner: MemoryTier) -> VerifiedTier:
    """The tier under test, with one value in it."""
    tier = VerifiedTier(inner)
    write(tier, [1], LENGTH)
    return tier


def stored(inner: MemoryTier, key: BlockKey) -> bytearray:
    """What the inner tier has under a key."""
    (found,) = read(inner, [key], LENGTH + HEADER_BYTES)
    assert found is not None
    return bytearray(found)


def put(inner: MemoryTier, key: BlockKey, data: bytes | bytearray) -> None:
    inner.write([key], [in_parts(data)])


def flipped(offset: int) -> Callable[[bytearray], bytearray]:
    def flip(data: bytearray) -> bytearray:
        data[offset] ^= 4
        return data

    return flip


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[: HEADER_BYTES - 1], verified.TRUNCATED),
        (lambda data: data[:HEADER_BYTES], verified.WRONG_LENGTH),
        (lambda data: data[:-1], verified.WRONG_LENGTH),
        (flipped(0), verified.TORN_HEADER),
        (flipped(8), verified.TORN_HEADER),
        (flipped(HEADER_BYTES - 1), verified.TORN_HEADER),
        (flipped(HEADER_BYTES), verified.WRONG_DIGEST),
        (flipped(-1), verified.WRONG_DIGEST),
        (lambda data: b"\0" * len(data), verified.TORN_HEADER),
    ],
)
def test_whatever_is_wrong_is_a_miss(
    tier: VerifiedTier,
    inner: MemoryTier,
    spoil: Callable[[bytearray], bytes],
    reason: str,
) -> None:
    """It is counted by its reason, and the value is taken out of the tier."""
    put(inner, block_key(1), spoil(stored(inner, block_key(1))))

    assert read(tier, [block_key(1)], LENGTH) == [None]
    assert {name for name, count in tier.counts().items() if count} == {reason}
    assert inner.lookup([block_key(1)]) == [False]


def test_any_flipped_bit_of_the_envelope_is_found(tier: VerifiedTier, inner: MemoryTier) -> None:
    """No byte of the header is without a check."""
    good = bytes(stored(inner, block_key(1)))
    for offset in range(HEADER_BYTES):
        put(inner, block_key(1), flipped(offset)(bytearray(good)))

        assert read(tier, [block_key(1)], LENGTH) == [None]


def test_another_version_is_a_miss(
    tier: VerifiedTier, inner: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value of a later release is not guessed at."""
    monkeypatch.setattr(verified, "VERSION", 2)

    assert read(tier, [block_key(1)], LENGTH) == [None]
    assert tier.counts()[verified.WRONG_FORMAT] == 1


@pytest.mark.parametrize(
    "other", [block_key(2), block_key(1, namespace=2), block_key(1, group_idx=1)]
)
def test_a_value_under_another_key_is_a_miss(
    tier: VerifiedTier, inner: MemoryTier, other: BlockKey
) -> None:
    """Whole and well, but made for another hash, namespace or group."""
    put(inner, other, stored(inner, block_key(1)))

    assert read(tier, [other], LENGTH) == [None]
    assert tier.counts()[verified.WRONG_KEY] == 1


def test_swapped_blocks_are_misses_and_their_neighbors_hits(
    tier: VerifiedTier, inner: MemoryTier
) -> None:
    """Of a batch, the wrong ones are misses and the others are not touched."""
    write(tier, [2, 3], LENGTH)
    one, two = stored(inner, block_key(1)), stored(inner, block_key(2))
    put(inner, block_key(1), two)
    put(inner, block_key(2), one)

    found = read(tier, [block_key(number) for number in (1, 2, 3)], LENGTH)

    assert found == [None, None, value_bytes(3, LENGTH)]
    assert list(inner.keys()) == [block_key(3)]


def test_a_value_is_written_again_after_it_was_found_wrong(
    tier: VerifiedTier, inner: MemoryTier
) -> None:
    """A rotten block comes back whole."""
    put(inner, block_key(1), flipped(-1)(stored(inner, block_key(1))))
    read(tier, [block_key(1)], LENGTH)
    write(tier, [1], LENGTH)

    assert read(tier, [block_key(1)], LENGTH) == [value_bytes(1, LENGTH)]


def test_a_failing_deletion_is_counted_only(tier: VerifiedTier, inner: MemoryTier) -> None:
    """The read is answered as a miss even if the rotten value cannot be taken out."""
    put(inner, block_key(1), flipped(-1)(stored(inner, block_key(1))))
    frozen = VerifiedTier(FaultyTier(inner, {TierFault.READ_ONLY: 1.0}, seed=1))

    assert read(frozen, [block_key(1)], LENGTH) == [None]
    assert frozen.counts()["deletions_failed"] == 1
    assert frozen.counts()[verified.WRONG_DIGEST] == 1


def test_a_plain_miss_is_not_counted(tier: VerifiedTier) -> None:
    """Nothing is wrong with a value that is not there, or has no room."""
    assert read(tier, [block_key(7)], LENGTH) == [None]
    assert read(tier, [block_key(1)], LENGTH - 1) == [None]
    assert set(tier.counts().values()) == {0}


def test_a_failing_tier_fails(inner: MemoryTier) -> None:
    """An error of the medium is the caller's to see."""
    tier = VerifiedTier(FaultyTier(inner, {TierFault.IO_ERROR: 1.0}, seed=1))

    with pytest.raises(UnavailableError, match="EIO"):
        read(tier, [block_key(1)], LENGTH)


def test_the_payload_is_not_copied() -> None:
    """The inner tier gets the caller's own memory, one part later."""
    seen: list[Parts] = []

    class Recorder(MemoryTier):
        def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
            seen.extend(values)
            return super().write(keys, values)

    value = bytearray(LENGTH)
    VerifiedTier(Recorder(1 << 20)).write([block_key(1)], [in_parts(value, 100)])

    assert [part.nbytes for part in seen[0]] == [HEADER_BYTES, 100, LENGTH - 100]
    assert seen[0][1].obj is value


class Bare:
    """A tier with no capability but the one it is given."""

    name = "bare"

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        return [False] * len(keys)

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        return [None] * len(keys)

    def delete(self, keys: Sequence[BlockKey]) -> None: ...

    def close(self) -> None: ...


class Probing(Bare):
    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [False] * len(keys)


class Listing(Bare):
    def keys(self) -> Iterator[BlockKey]:
        return iter(())


class Registering(Bare):
    def register(self, region: memoryview) -> None: ...


class Gauging(Bare):
    use = memory.MemoryTier(1).use


@pytest.mark.parametrize("inner", [Bare(), Probing(), Listing(), Registering(), Gauging()])
def test_a_wrapper_can_what_its_inner_tier_can(inner: Bare) -> None:
    """No capability is lost, and none is feigned; also through two wrappers."""
    wrapped = VerifiedTier(VerifiedTier(inner))
    kinds = (Probes, Lists, Registers, Gauges)

    assert [isinstance(wrapped, kind) for kind in kinds] == [
        isinstance(inner, kind) for kind in kinds
    ]
    assert isinstance(wrapped, VerifiedTier)
    assert type(wrapped).__name__ == "VerifiedTier"
