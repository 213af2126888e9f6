"""Sequences against a dict: any calls, and the table has what the dict has, or nothing."""

from collections import OrderedDict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvkeep.core.sequences import (
    LAYER_COST_BYTES,
    SEQUENCE_COST_BYTES,
    LayerKv,
    MissingError,
    Part,
    Rows,
    SequenceTable,
    StoredSequence,
)
from kvkeep.model.errors import CapacityError, RefusedError

Tokens = dict[int, list[bytes]]
"""Rows by layer; keys, and values as their complement."""

ROW_BYTES = 512
BYTES_MAX = 6 * (SEQUENCE_COST_BYTES + 2 * LAYER_COST_BYTES) + 80 * ROW_BYTES
SEQUENCE_BYTES_MAX = BYTES_MAX // 2

NAMES = st.sampled_from("abcdefgh")
BODIES = st.dictionaries(st.integers(0, 2), st.integers(1, 12), min_size=1, max_size=3)
"""Tokens by layer."""


class SequencesAgainstADict(RuleBasedStateMachine):
    """The dict never evicts: what the table evicted is taken out of it when it is noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SequenceTable(BYTES_MAX, SEQUENCE_BYTES_MAX)
        self.model: OrderedDict[str, Tokens] = OrderedDict()
        self.evicted: set[str] = set()
        self.held: list[tuple[StoredSequence, Tokens]] = []
        self.num_rows = 0

    def body(
        self, sizes: dict[int, int], dtype: str = "uint8"
    ) -> tuple[dict[int, LayerKv], Tokens]:
        """Layers with rows that no others are equal to."""
        layers, tokens = {}, {}
        rows = Rows(dtype, 1, ROW_BYTES, ROW_BYTES)
        for layer_idx, num_tokens in sizes.items():
            tokens[layer_idx] = [self.row() for _ in range(num_tokens)]
            key = b"".join(tokens[layer_idx])
            layers[layer_idx] = LayerKv(
                Part(rows, num_tokens, (key,)), Part(rows, num_tokens, (_value_of(key),))
            )
        return layers, tokens

    def row(self) -> bytes:
        """A row like no other."""
        self.num_rows += 1
        return self.num_rows.to_bytes(8, "little") * (ROW_BYTES // 8)

    def landed(self, name: str, tokens: Tokens) -> None:
        """Take over what the table has to have, and notice what it let go for that."""
        self.model[name] = tokens
        self.model.move_to_end(name)
        self.evicted.discard(name)
        num_left = len(self.table)
        while len(self.model) > num_left:
            gone, _ = self.model.popitem(last=False)
            assert gone != name
            self.evicted.add(gone)

    @rule(name=NAMES, sizes=BODIES)
    def put(self, name: str, sizes: dict[int, int]) -> None:
        layers, tokens = self.body(sizes)
        try:
            self.table.put(name, layers)
        except CapacityError:
            return
        self.landed(name, tokens)

    @rule(name=NAMES, sizes=BODIES)
    def put_layers(self, name: str, sizes: dict[int, int]) -> None:
        layers, tokens = self.body(sizes)
        try:
            self.table.put_layers(name, layers)
        except CapacityError:
            return
        except MissingError:
            assert name in self.evicted
            return
        assert name not in self.evicted
        self.landed(name, self.model.get(name, {}) | tokens)

    @rule(name=NAMES, sizes=BODIES, expected=st.none() | st.integers(0, 12), creates=st.booleans())
    def append(self, name: str, sizes: dict[int, int], expected: int | None, creates: bool) -> None:
        layers, tokens = self.body(sizes)
        before = self.model.get(name, {})
        try:
            self.table.append(name, layers, expected_length=expected, creates=creates)
        except CapacityError:
            return
        except MissingError:
            assert not before
            assert not creates or name in self.evicted
            return
        except RefusedError:
            assert any(len(before.get(idx, [])) != expected for idx in sizes)
            return
        assert expected is None or all(len(before.get(idx, [])) == expected for idx in sizes)
        assert name not in self.evicted or expected == 0
        self.landed(
            name, before | {idx: [*before.get(idx, []), *rows] for idx, rows in tokens.items()}
        )

    @rule(name=NAMES, sizes=BODIES)
    def append_of_another_kind(self, name: str, sizes: dict[int, int]) -> None:
        layers, _ = self.body(sizes, dtype="int8")
        if not self.model.get(name, {}).keys() & sizes.keys():
            return
        try:
            self.table.append(name, layers)
        except RefusedError:
            return
        raise AssertionError("rows of two kinds in one layer")

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        assert self.table.delete(name) == (name in self.model)
        self.model.pop(name, None)
        self.evicted.discard(name)

    @rule(name=NAMES)
    def find(self, name: str) -> None:
        found = self.table.find(name)
        assert (found is not None) == (name in self.model)
        if found is not None:
            self.model.move_to_end(name)
            self.held = [*self.held[-4:], (found, self.model[name])]

    @invariant()
    def what_is_there_is_whole(self) -> None:
        """Every sequence, and every one that somebody found earlier."""
        self.table.check()
        assert len(self.table) == len(self.model)
        for found, tokens in self.held:
            _compare(found, tokens)
        # Not with ``find``, which touches: whose turn it is to make room is part of the model.
        assert list(self.table._sequences) == list(self.model)
        for name, stored in self.table._sequences.items():
            _compare(stored, self.model[name])


def _value_of(key: bytes) -> bytes:
    return bytes(255 - byte for byte in key)


def _compare(found: StoredSequence, tokens: Tokens) -> None:
    assert set(found.layers) == set(tokens)
    for layer_idx, rows in tokens.items():
        layer, key = found.layers[layer_idx], b"".join(rows)
        assert layer.num_tokens == len(rows)
        assert b"".join(layer.key.pieces) == key
        assert b"".join(layer.value.pieces) == _value_of(key)


TestSequencesAgainstADict = SequencesAgainstADict.TestCase
TestSequencesAgainstADict.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None
)
