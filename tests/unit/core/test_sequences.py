"""Which sequences there are, and which make room."""

import pytest

from kvkeep.core import sequences
from kvkeep.core.sequences import (
    LAYER_COST_BYTES,
    MERGE_BYTES_MAX,
    PIECE_COST_BYTES,
    SEQUENCE_COST_BYTES,
    LayerKv,
    MissingError,
    Part,
    Rows,
    SequenceTable,
)
from kvkeep.model.errors import CapacityError, InvariantError, RefusedError

ROW_BYTES = 100
ONE_BYTES = SEQUENCE_COST_BYTES + LAYER_COST_BYTES + 2 * (PIECE_COST_BYTES + ROW_BYTES)
"""What a sequence of one layer and one token costs."""


def layer(num_tokens: int = 1, fill: int = 1, dtype: str = "uint8") -> LayerKv:
    """Keys and values of so many tokens, all of one byte."""
    rows = Rows(dtype, 1, ROW_BYTES, ROW_BYTES)
    piece = bytes([fill]) * (num_tokens * ROW_BYTES)
    return LayerKv(Part(rows, num_tokens, (piece,)), Part(rows, num_tokens, (piece,)))


def table(num_sequences: int = 3) -> SequenceTable:
    """A table with room for so many sequences of one token."""
    return SequenceTable(num_sequences * ONE_BYTES, num_sequences * ONE_BYTES)


def bytes_of(found: sequences.StoredSequence | None, layer_idx: int = 0) -> bytes:
    """The keys of a layer."""
    assert found is not None
    return b"".join(found.layers[layer_idx].key.pieces)


def test_the_longest_unused_makes_room() -> None:
    """Reading is using."""
    found = table()
    for name in "abc":
        found.put(name, {0: layer()})
    found.find("a")
    found.put("d", {0: layer()})
    found.check()

    assert [name for name in "abcd" if found.find(name)] == ["a", "c", "d"]
    assert found.num_evicted == 1


def test_a_sequence_does_not_make_room_for_itself() -> None:
    """An append lets the others go, and what it appends to stays."""
    found = table()
    for name in "abc":
        found.put(name, {0: layer()})
    found.append("a", {0: layer(30)})
    found.check()

    after = found.find("a")
    assert after is not None
    assert after.num_tokens == 31


def test_one_larger_than_may_be_changes_nothing() -> None:
    """Neither put, nor layers of it, nor appended; and nobody makes room for it."""
    found = SequenceTable(10 * ONE_BYTES, 2 * ONE_BYTES)
    found.put("a", {0: layer(fill=7)})
    found.put("b", {0: layer()})
    big = {0: layer(200)}
    for refused in (found.put, found.append):
        with pytest.raises(CapacityError, match="one may take"):
            refused("a", big)
    with pytest.raises(CapacityError):
        found.put_layers("a", {1: layer(200)})
    found.check()

    assert bytes_of(found.find("a")) == bytes([7]) * ROW_BYTES
    assert found.num_evicted == 0


def test_what_was_evicted_does_not_begin_in_its_middle() -> None:
    """Nobody reads the end of a sequence as if it were the whole of it."""
    found = table(1)
    found.put("a", {0: layer()})
    found.put("b", {0: layer()})
    for refused in (found.append, found.put_layers):
        with pytest.raises(MissingError, match="was evicted"):
            refused("a", {0: layer()})

    assert found.find("a") is None
    assert found.append("a", {0: layer(fill=2)}, expected_length=0).num_tokens == 1


def test_an_evicted_name_is_free_after_a_put_or_a_delete() -> None:
    """Then its owner knows that it begins anew."""
    found = table(1)
    for name in "abc":
        found.put(name, {0: layer()})
    found.put("a", {0: layer()})
    found.delete("a")
    found.delete("b")

    assert found.append("a", {0: layer()}).num_tokens == 1
    assert found.append("b", {0: layer()}).num_tokens == 1


def test_whoever_forgot_what_was_evicted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then every sequence that begins with an append has to be known to begin."""
    monkeypatch.setattr(sequences, "EVICTED_MAX", 2)
    found = table(1)
    for name in "abcd":
        found.put(name, {0: layer()})
    with pytest.raises(MissingError, match="may have been evicted"):
        found.append("a", {0: layer()})

    assert found.append("new", {0: layer()}, expected_length=0).num_tokens == 1


def test_an_append_lands_in_all_layers_or_in_none() -> None:
    """The second layer does not fit, so the first one stays too."""
    found = table(9)
    found.put("a", {0: layer(), 1: layer(dtype="int8")})
    with pytest.raises(RefusedError, match="layer 1"):
        found.append("a", {0: layer(), 1: layer(dtype="uint8")})

    after = found.find("a")
    assert after is not None
    assert {idx: each.num_tokens for idx, each in after.layers.items()} == {0: 1, 1: 1}


def test_an_expected_length_is_that_of_each_layer() -> None:
    """Of two appends that expect the same one lands."""
    found = table(9)
    found.append("a", {0: layer(), 1: layer()}, expected_length=0)
    found.append("a", {0: layer()}, expected_length=1)
    for layers in ({0: layer()}, {0: layer(), 1: layer()}, {2: layer()}):
        with pytest.raises(RefusedError, match="not the 1 expected"):
            found.append("a", layers, expected_length=1)

    assert found.append("a", {1: layer()}, expected_length=1).num_tokens == 2


def test_an_append_may_ask_that_the_sequence_is_there() -> None:
    """And begins none then."""
    found = table()
    with pytest.raises(MissingError):
        found.append("a", {0: layer()}, creates=False)

    assert found.find("a") is None


def test_layers_are_put_beside_the_others() -> None:
    """A put of the whole sequence leaves no other layer."""
    found = table(9)
    found.put("a", {0: layer(fill=1), 1: layer(fill=2)})
    found.put_layers("a", {1: layer(3, fill=3), 2: layer(fill=4)})
    after = found.find("a")
    found.put("a", {5: layer()})
    found.check()
    whole = found.find("a")

    assert whole is not None
    assert set(whole.layers) == {5}
    assert (bytes_of(after, 0)[0], bytes_of(after, 1)[0], bytes_of(after, 2)[0]) == (1, 3, 4)
    assert after is not None
    assert after.num_tokens == 1


def test_a_reader_keeps_what_it_found() -> None:
    """Whatever is appended, put, deleted or evicted later."""
    found = table(2)
    found.put("a", {0: layer(2, fill=1)})
    before = found.find("a")
    found.append("a", {0: layer(fill=2)})
    found.put("a", {0: layer(fill=3)})
    found.delete("a")

    assert bytes_of(before) == bytes([1]) * 2 * ROW_BYTES


def test_many_small_appends_make_few_pieces() -> None:
    """And not one byte is lost or moved."""
    found = SequenceTable(1 << 30, 1 << 30)
    num_appends = 4 * MERGE_BYTES_MAX // ROW_BYTES
    for number in range(num_appends):
        found.append("a", {0: layer(fill=number % 256)})
    found.check()
    after = found.find("a")
    assert after is not None
    pieces = after.layers[0].key.pieces

    assert bytes_of(after) == b"".join(
        bytes([number % 256]) * ROW_BYTES for number in range(num_appends)
    )
    assert len(pieces) < 25
    assert max(map(len, pieces)) <= MERGE_BYTES_MAX


def test_a_delete_says_whether_there_was_something() -> None:
    """Twice is no mistake."""
    found = table()
    found.put("a", {0: layer()})

    assert [found.delete("a"), found.delete("a")] == [True, False]
    assert (len(found), found.num_bytes) == (0, 0)


def test_a_wrong_count_is_found() -> None:
    """The check can fail."""
    found = table()
    found.put("a", {0: layer()})
    found.num_bytes += 1

    with pytest.raises(InvariantError):
        found.check()
