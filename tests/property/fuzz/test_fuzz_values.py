"""Values that tiers give back, and what servers answer: right, or a miss, or not available."""

import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.testing.tier_contract import block_key, in_parts
from kvkeep.tiers import valkey
from kvkeep.tiers.base import Tier
from kvkeep.tiers.entry_names import HEAD_BYTES, entry_name, pack_head
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.object_store import ObjectStoreSettings, ObjectStoreTier
from kvkeep.tiers.valkey import ValkeySettings, ValkeyTier
from kvkeep.tiers.valkey_wire import REPLY_BYTES_MAX, WireConnection
from kvkeep.tiers.wrappers.codecs import ZstdCodec
from kvkeep.tiers.wrappers.compressed import CompressedTier
from kvkeep.tiers.wrappers.encrypted import EncryptedTier
from kvkeep.tiers.wrappers.key_ring import KeyRing
from kvkeep.tiers.wrappers.verified import HEADER_BYTES, VerifiedTier
from tests.property.fuzz.damage import NUMBERS, costing_at_most, damaged, examples

KEY = block_key(1)
VALUE = bytes(range(256)) * 2
ROOM_BYTES = 1000
RING = KeyRing([b"k" * 32])
KINDS: list[Callable[[Tier], Tier]] = [
    VerifiedTier,
    lambda inner: EncryptedTier(inner, RING),
    lambda inner: CompressedTier(inner, ZstdCodec()),
    lambda inner: VerifiedTier(CompressedTier(EncryptedTier(inner, RING), ZstdCodec())),
]


def read_one(tier: Tier, key: BlockKey = KEY) -> bytes | None:
    """What a tier has under a key; None where nothing, or it is not available."""
    room = bytearray(ROOM_BYTES)
    try:
        (length,) = tier.read([key], [in_parts(room, 300)])
    except UnavailableError:
        return None
    assert length is None or 0 <= length <= ROOM_BYTES
    return None if length is None else bytes(room[:length])


# ---- wrappers


@pytest.mark.parametrize("which", range(len(KINDS)))
@given(data=st.data())
@examples(40)
def test_a_damaged_value_is_a_miss(which: int, data: st.DataObject) -> None:
    """Whatever lies in the tier inside; a wrapper without a digest answers within the room."""
    inner = MemoryTier(1 << 16)
    tier = KINDS[which](inner)
    tier.write([KEY], [in_parts(VALUE)])
    stored = bytearray(2 * ROOM_BYTES)
    (length,) = inner.read([KEY], [in_parts(stored)])
    bad = data.draw(damaged(bytes(stored[:length])))
    inner.write([KEY], [in_parts(bad)])
    found = read_one(tier)

    assert which == 2 or found in (None, VALUE)


@given(NUMBERS, st.integers(0, 1 << 16), st.binary(max_size=300))
@examples(40)
def test_an_envelope_with_a_right_check_lies_in_vain(
    length: int, group_idx: int, rest: bytes
) -> None:
    """Its check is anyone's to make: key, length and digest are looked at all the same."""
    names = (length, KEY.namespace, KEY.block_hash, xxhash.xxh3_128_digest(rest))
    fields = struct.pack("<4sHHQ32s32s16s24x", b"kvkv", 1, group_idx & 0xFFFF, *names)
    envelope = fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))
    assert len(envelope) == HEADER_BYTES
    inner = MemoryTier(1 << 16)
    inner.write([KEY], [in_parts(envelope + rest)])
    is_right = (length, group_idx) == (len(rest), KEY.group_idx)

    assert read_one(VerifiedTier(inner)) == (rest if is_right else None)


@pytest.mark.parametrize("number", [1 << 20, 1 << 31, 1 << 32, 1 << 60, (1 << 64) - 1])
def test_a_claimed_length_costs_nothing(number: int) -> None:
    """Each wrapper's header, and a frame of Zstandard, claims to hold that much."""
    claim = struct.pack("<Q", number)
    frame = b"\x28\xb5\x2f\xfd\xe0" + claim + b"\x01\x00\x00"
    headers = [
        b"kvkc\x01\x00\x01\x02" + claim + frame,
        b"kvkc\x01\x00\x01\x02" + struct.pack("<Q", 900) + frame,
        b"kvkc\x01\x00\x00\x01" + claim + frame,
        b"kvke\x01\x00\x00\x00" + bytes(8) + claim + bytes(60),
        b"kvkv\x01\x00\x00\x00" + claim + bytes(120),
    ]
    for header in headers:
        for kind in KINDS:
            inner = MemoryTier(1 << 16)
            inner.write([KEY], [in_parts(header)])
            with costing_at_most(1 << 20):
                assert read_one(kind(inner)) is None


# ---- an object store


class Answer:
    """What obstore's client returns for an object."""

    def __init__(self, content: bytes, size: int) -> None:
        self._content = content
        self.meta = {"size": size}

    def bytes(self) -> bytes:
        """The body, however long the head said it is."""
        return self._content


class Liar:
    """A store whose objects are not what they were, nor as long as it says."""

    def __init__(self, content: bytes, size: int) -> None:
        self._answer = Answer(content, size)

    def get(self, _name: str) -> Answer:
        """Any object."""
        return self._answer

    def get_range(self, _name: str, *, start: int, end: int) -> bytes:
        """A piece of it."""
        return self._answer.bytes()[start:end]

    def head(self, _name: str) -> dict[str, int]:
        """Its length, as it claims."""
        return self._answer.meta

    def delete(self, _name: str) -> None:
        """As if it were gone."""


NAME = entry_name(KEY, "kvkeep/")
OBJECT = pack_head(NAME, len(VALUE)) + VALUE


@given(damaged(OBJECT), st.none() | NUMBERS)
@examples(150)
def test_any_object_is_the_value_or_a_miss(content: bytes, size: int | None) -> None:
    """Shorter, longer, another's, or of another length than it says."""
    tier = ObjectStoreTier(ObjectStoreSettings(url="memory://", num_threads=1))
    tier._store = Liar(content, len(content) if size is None else size)  # type: ignore[assignment]
    found = read_one(tier)
    tier.lookup([KEY])
    tier.close()

    # The head proves its own place and length; the bytes behind it are the verifying wrapper's.
    assert found is None or content == pack_head(NAME, len(found)) + found


# ---- a Valkey server


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], ValkeyTier]:
    """Makes a tier whose server sends these bytes, whatever it is asked, and hangs up."""

    def make(answer: bytes) -> ValkeyTier:
        def connect(*_: Any) -> WireConnection:
            near, far = socket.socketpair()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            far.sendall(answer)
            far.shutdown(socket.SHUT_WR)
            ends.append(far)
            return WireConnection(near)

        monkeypatch.setattr(valkey, "connect", connect)
        return ValkeyTier(ValkeySettings(url="valkey://h", timeout_s=2.0))

    ends: list[socket.socket] = []
    Answering.ends = ends
    return make


class Answering:
    """The server's ends of the connections made in one example."""

    ends: list[socket.socket]

    @classmethod
    def close(cls) -> None:
        """Close them."""
        for end in cls.ends:
            end.close()
        cls.ends.clear()


BULK = b"$%d\r\n%s\r\n" % (len(OBJECT), OBJECT)
PAGE = b"*2\r\n$1\r\n0\r\n*2\r\n$%d\r\n%s\r\n$1\r\nx\r\n" % (len(NAME), NAME.encode())
REPLIES = st.sampled_from([BULK, PAGE, b":24\r\n", b"$-1\r\n", b"-OOM x\r\n", b"+OK\r\n"])


def use_valkey(tier: ValkeyTier) -> Iterator[object]:
    """One call of each kind; what it gave, or that it was not available."""
    calls: list[Callable[[], object]] = [
        lambda: read_one(tier),
        lambda: tier.lookup([KEY]),
        lambda: list(tier.keys()),
        lambda: tier.write([KEY], [in_parts(b"v")]),
        lambda: tier.delete([KEY]),
    ]
    for call in calls:
        try:
            yield call()
        except UnavailableError as error:
            yield str(error)
        finally:
            Answering.close()
    tier.close()


@given(data=st.data())
@settings(
    examples(80), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_answer_of_a_server_is_a_value_or_a_miss(
    answering: Callable[[bytes], ValkeyTier], data: st.DataObject
) -> None:
    """Damaged, exchanged, endless or none."""
    answer = data.draw(damaged(data.draw(REPLIES)))
    found, has, names, *_ = use_valkey(answering(answer))

    assert found is None or isinstance(found, bytes)
    assert isinstance(has, str) or has in ([True], [False])
    assert isinstance(names, str) or names in ([], [KEY])


@given(st.binary(min_size=HEAD_BYTES, max_size=HEAD_BYTES))
@settings(
    examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_strangers_short_value_is_a_miss(
    answering: Callable[[bytes], ValkeyTier], content: bytes
) -> None:
    """As long as a head, and no head of ours."""
    found, *_ = use_valkey(answering(b"$24\r\n%s\r\n" % content))

    assert found is None


HOSTILE = {
    "a value of 2**59": b"$576460752303423488\r\n" + b"x" * 1000,
    "an array of 2**59": b"*576460752303423488\r\n",
    "an array of arrays": b"*2\r\n$1\r\n0\r\n*576460752303423488\r\n" + b"$-1\r\n" * 2_000,
    "empty elements": b"*2\r\n$1\r\n0\r\n*9999999\r\n" + b"+\r\n" * 5_000,
    "deep": b"*1\r\n" * 2_000,
    "a text of all that is allowed": b"$%d\r\n" % (REPLY_BYTES_MAX - 999),
    "an endless line": b"+" + b"x" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_server_claims_costs_little(
    answering: Callable[[bytes], ValkeyTier], name: str
) -> None:
    """Lengths and counts take no memory before the bytes are there, but for one short reply."""
    tier = answering(HOSTILE[name])
    with costing_at_most(2 * REPLY_BYTES_MAX):
        for answer in use_valkey(tier):
            assert answer is None or isinstance(answer, str)
