"""What lies inside says nothing, and opens for its tenant, its key and unchanged only."""

from collections.abc import Callable

import pytest

from kvkeep.model.ids import BlockKey, Namespace
from kvkeep.testing.tier_contract import block_key, in_parts, read, value_bytes, write
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers import encrypted, wrapper
from kvkeep.tiers.wrappers.encrypted import HEADER_BYTES, EncryptedTier
from kvkeep.tiers.wrappers.key_ring import KeyRing, TenantKey

LENGTH = 5000
RING = KeyRing([b"k" * 32])


@pytest.fixture
def inner() -> MemoryTier:
    """Where the ciphertext lies."""
    return MemoryTier(1 << 20)


@pytest.fixture
def tier(inner: MemoryTier) -> EncryptedTier:
    """The tier under test, with one value in it."""
    tier = EncryptedTier(inner, RING)
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


def reasons(tier: EncryptedTier) -> set[str]:
    return {name for name, count in tier.counts().items() if count}


def test_nothing_of_the_value_is_inside(tier: EncryptedTier, inner: MemoryTier) -> None:
    """No eight bytes of the value stand in what is stored; its length is as promised."""
    value, found = value_bytes(1, LENGTH), stored(inner, block_key(1))

    assert len(found) == LENGTH + EncryptedTier.overhead_bytes
    assert not any(value[at : at + 8] in found for at in range(0, LENGTH - 8))


def test_no_nonce_is_used_twice(tier: EncryptedTier, inner: MemoryTier) -> None:
    """The same value under the same key looks different each time."""
    first = stored(inner, block_key(1))
    write(tier, [1], LENGTH)
    second = stored(inner, block_key(1))

    assert first[36:48] != second[36:48]
    assert first[HEADER_BYTES:] != second[HEADER_BYTES:]


def test_the_callers_memory_is_not_changed(tier: EncryptedTier) -> None:
    """A slot of the pool is encrypted in a copy."""
    memory = bytearray(value_bytes(2, LENGTH))
    tier.write([block_key(2)], [in_parts(memory, 7)])

    assert memory == value_bytes(2, LENGTH)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[: HEADER_BYTES - 1], encrypted.TRUNCATED),
        (lambda data: data[:-1], encrypted.WRONG_LENGTH),
        (flipped(0), encrypted.WRONG_FORMAT),
        (flipped(4), encrypted.WRONG_FORMAT),
        (flipped(6), encrypted.NOT_AUTHENTIC),
        (flipped(8), encrypted.UNKNOWN_KEY),
        (flipped(16), encrypted.WRONG_LENGTH),
        (flipped(24), encrypted.NOT_AUTHENTIC),
        (flipped(36), encrypted.NOT_AUTHENTIC),
        (flipped(48), encrypted.NOT_AUTHENTIC),
        (flipped(HEADER_BYTES), encrypted.NOT_AUTHENTIC),
        (flipped(-1), encrypted.NOT_AUTHENTIC),
    ],
)
def test_what_was_changed_does_not_open(
    tier: EncryptedTier,
    inner: MemoryTier,
    spoil: Callable[[bytearray], bytes],
    reason: str,
) -> None:
    """It is a miss, counted by its reason, and taken out of the tier."""
    put(inner, block_key(1), spoil(stored(inner, block_key(1))))

    assert read(tier, [block_key(1)], LENGTH) == [None]
    assert reasons(tier) == {reason}
    assert inner.lookup([block_key(1)]) == [False]


@pytest.mark.parametrize(
    "other", [block_key(2), block_key(1, namespace=2), block_key(1, group_idx=1)]
)
def test_a_value_under_another_key_does_not_open(
    tier: EncryptedTier, inner: MemoryTier, other: BlockKey
) -> None:
    """The block key is authenticated with the value, the tenant by its key."""
    put(inner, other, stored(inner, block_key(1)))

    assert read(tier, [other], LENGTH) == [None]
    assert reasons(tier) == {encrypted.NOT_AUTHENTIC}


def test_another_master_key_does_not_open(tier: EncryptedTier, inner: MemoryTier) -> None:
    """What another deployment wrote is a miss."""
    stranger = EncryptedTier(inner, KeyRing([b"s" * 32]))

    assert read(stranger, [block_key(1)], LENGTH) == [None]
    assert reasons(stranger) == {encrypted.UNKNOWN_KEY}


def test_values_of_an_old_key_still_open(tier: EncryptedTier, inner: MemoryTier) -> None:
    """After a change of the key nothing has to be written again."""
    changed = EncryptedTier(inner, KeyRing([b"n" * 32, b"k" * 32]))
    write(changed, [2], LENGTH)

    assert read(changed, [block_key(1), block_key(2)], LENGTH) == [
        value_bytes(1, LENGTH),
        value_bytes(2, LENGTH),
    ]
    assert read(tier, [block_key(2)], LENGTH) == [None]


class OneTenant:
    """Keys for a single namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace

    def find_writing(self, namespace: Namespace) -> TenantKey | None:
        return RING.find_writing(namespace) if namespace == self.namespace else None

    def find_reading(self, namespace: Namespace, key_id: bytes) -> TenantKey | None:
        return RING.find_reading(namespace, key_id) if namespace == self.namespace else None


def test_without_a_key_nothing_is_written_read_or_deleted(
    tier: EncryptedTier, inner: MemoryTier
) -> None:
    """A namespace that is not served here is left alone, its neighbor in the batch is served."""
    mine, others = block_key(2, namespace=2), block_key(1)
    narrow = EncryptedTier(inner, OneTenant(mine.namespace))
    value = value_bytes(2, LENGTH)

    assert narrow.write([others, mine], [in_parts(value), in_parts(value)]) == [False, True]
    assert read(narrow, [others, mine], LENGTH) == [None, value]
    assert read(tier, [others], LENGTH) == [value_bytes(1, LENGTH)]
    assert narrow.counts()["no_key"] == 2


def test_a_large_batch_goes_in_steps(
    tier: EncryptedTier, inner: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are bounded: a batch is cut, and is answered as a whole."""
    monkeypatch.setattr(wrapper, "SCRATCH_BYTES_MAX", 3 * LENGTH)
    numbers = range(10)

    assert write(tier, numbers, LENGTH) == [True] * 10
    found = read(tier, [block_key(number) for number in numbers], LENGTH)
    assert found == [value_bytes(number, LENGTH) for number in numbers]


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([], []),
        ([9], [slice(0, 1)]),
        ([2, 2, 2], [slice(0, 2), slice(2, 3)]),
        ([9, 1, 9], [slice(0, 1), slice(1, 2), slice(2, 3)]),
    ],
)
def test_steps_are_as_large_as_allowed(
    lengths: list[int], wanted: list[slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value larger than the limit goes alone."""
    monkeypatch.setattr(wrapper, "SCRATCH_BYTES_MAX", 4)

    assert list(wrapper.in_steps(lengths)) == wanted
