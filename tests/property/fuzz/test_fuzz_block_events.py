"""Whatever bytes come as a batch of events, they are read or refused, and the tables agree."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.router.events.block_events import decode_batch
from kvkeep.router.prefix_index import PrefixIndex

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
kinds = st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "Other"])
almost_events = st.fixed_dictionaries(
    {"type": kinds},
    optional={
        "block_hashes": plain | st.lists(st.integers(0, 2**64 - 1), max_size=3),
        "parent_block_hash": plain,
        "token_ids": plain | st.lists(st.integers(0, 2**32), max_size=6),
        "block_size": plain | st.integers(1, 3),
        "medium": plain,
        "lora_name": plain,
        "extra_keys": plain | st.lists(st.lists(plain, max_size=2), max_size=3),
        "group_idx": plain,
        "unknown": plain,
    },
)


def take(index: PrefixIndex, payload: bytes) -> int:
    """Feed an index what a payload says; returns how many events it held."""
    try:
        batch = decode_batch(payload)
    except ValueError:
        return 0
    for event in batch.events:
        index.apply("engine", event)
    index.check()
    return len(batch.events)


@given(payloads=st.lists(st.binary(max_size=60), max_size=5))
def test_random_bytes(payloads: list[bytes]) -> None:
    """No bytes break the reader."""
    index = PrefixIndex(2, 16)
    for payload in payloads:
        take(index, payload)


@given(batches=st.lists(st.lists(almost_events, max_size=4), max_size=4), rank=plain)
def test_almost_events(batches: list[list[dict[str, Any]]], rank: object) -> None:
    """No well-packed nonsense breaks the tables, whatever it leaves out or puts in."""
    index = PrefixIndex(2, 16)
    for events in batches:
        take(index, msgspec.msgpack.encode([1.0, events, rank]))
    index.drop("engine")

    assert len(index) == 0


@given(cut=st.integers(0, 80), flip=st.integers(0, 8 * 80))
def test_damaged_events(cut: int, flip: int) -> None:
    """A batch that was cut or of which a bit fell over is read or refused."""
    event = {"type": "BlockStored", "block_hashes": [1, 2], "token_ids": [1] * 4, "block_size": 2}
    whole = msgspec.msgpack.encode([1.0, [event], 0])
    index = PrefixIndex(2, 16)

    assert take(index, whole) == 1
    take(index, whole[:cut])
    damaged = bytearray(whole)
    damaged[flip // 8 % len(damaged)] ^= 1 << flip % 8
    take(index, bytes(damaged))
