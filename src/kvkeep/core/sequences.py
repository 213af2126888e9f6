"""Named sequences' K/V by layer: which there are, within how many bytes, and which make room.

A sequence is a value that never changes: what is put or appended makes another one, which takes
its name at once. So whoever reads has it whole, as it was at one time, whatever happens meanwhile.
The bytes themselves are opaque pieces that somebody else received and never changes again.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from kvkeep.model.errors import CapacityError, InvariantError, RefusedError

Piece: TypeAlias = "bytes | memoryview"

SEQUENCE_COST_BYTES = 2048
LAYER_COST_BYTES = 1536
PIECE_COST_BYTES = 256
"""What a sequence, a layer and a piece cost beside their bytes: counted, so that ever so many small
ones are bounded by the same limit."""
MERGE_BYTES_MAX = 64 << 10
"""Appended pieces are joined up to this size: few enough to be sent, small enough to be copied in
no time. A byte is copied at most about log2(this / bytes of an append) times."""
EVICTED_MAX = 1 << 16
"""Names of evicted sequences that are remembered, as 8 bytes each."""


class MissingError(RefusedError):
    """There is no such sequence, or it lacks a layer."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What one token has in a tensor; the same for all its tokens."""

    dtype: str
    num_heads: int
    head_dim: int
    row_bytes: int

    def __str__(self) -> str:
        return f"{self.dtype} [tokens, {self.num_heads}, {self.head_dim}]"


@dataclass(frozen=True, slots=True)
class Part:
    """The keys or the values of a layer."""

    rows: Rows
    num_tokens: int
    pieces: tuple[Piece, ...]
    """Their bytes, one after another."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tokens."""
        return self.num_tokens * self.rows.row_bytes

    def extended(self, more: "Part") -> "Part":
        """This and more tokens behind it."""
        pieces = _merged([*self.pieces, *more.pieces])
        return Part(self.rows, self.num_tokens + more.num_tokens, tuple(pieces))


@dataclass(frozen=True, slots=True)
class LayerKv:
    """Keys and values of one layer: as many tokens."""

    key: Part
    value: Part

    @property
    def num_tokens(self) -> int:
        """Tokens of the layer."""
        return self.key.num_tokens


@dataclass(frozen=True, slots=True)
class StoredSequence:
    """All layers of a sequence."""

    layers: Mapping[int, LayerKv]
    cost_bytes: int
    """What it takes of the limit."""

    @property
    def num_tokens(self) -> int:
        """Tokens that every layer has."""
        return min(layer.num_tokens for layer in self.layers.values())


class SequenceTable:
    """The sequences of one daemon. Whole ones make room, the longest unused first."""

    def __init__(self, bytes_max: int, sequence_bytes_max: int) -> None:
        """Start with none.

        Args:
            bytes_max: What all may cost together.
            sequence_bytes_max: What one may cost; at most as much.
        """
        self._bytes_max = bytes_max
        self._sequence_bytes_max = min(sequence_bytes_max, bytes_max)
        self._sequences: OrderedDict[str, StoredSequence] = OrderedDict()
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._has_forgotten = False
        self.num_bytes = 0
        """What all cost together."""
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def find(self, name: str) -> StoredSequence | None:
        """The sequence as it is now, and as it stays for whoever holds it; touches it."""
        found = self._sequences.get(name)
        if found is not None:
            self._sequences.move_to_end(name)
        return found

    def put(self, name: str, layers: Mapping[int, LayerKv]) -> StoredSequence:
        """Let a sequence be these layers and no others.

        Raises:
            CapacityError: It is larger than one may be; nothing was changed.
        """
        return self._set(name, layers)

    def put_layers(self, name: str, layers: Mapping[int, LayerKv]) -> StoredSequence:
        """Let these layers of a sequence be so; its others stay.

        Raises:
            CapacityError: It would be larger than one may be; nothing was changed.
            MissingError: It was evicted, so that its others are gone; nothing was changed.
        """
        before = self._sequences.get(name)
        if before is None:
            self._check_beginning(name)
            return self._set(name, layers)
        return self._set(name, {**before.layers, **layers})

    def append(
        self,
        name: str,
        layers: Mapping[int, LayerKv],
        *,
        expected_length: int | None = None,
        creates: bool = True,
    ) -> StoredSequence:
        """Put tokens behind those of each of these layers, or of none of them.

        Args:
            name: Of the sequence, which begins with these tokens if it is not there.
            layers: The tokens; layers that are not named stay as they are.
            expected_length: Tokens that each of these layers must have before; 0: none.
            creates: Whether it may begin with these tokens.

        Raises:
            RefusedError: A layer has another length than expected, or other rows.
            MissingError: It is not there and may not begin here, or was evicted.
            CapacityError: It would be larger than one may be.
            After each of them nothing was changed.
        """
        before = self._sequences.get(name)
        if before is None and not creates:
            raise MissingError(f"there is no sequence {name} (any more): put it again")
        held: Mapping[int, LayerKv] = {} if before is None else before.layers
        for layer_idx in sorted(layers):
            _check_append(name, layer_idx, held.get(layer_idx), layers[layer_idx], expected_length)
        if before is None and expected_length != 0:
            self._check_beginning(name)
        # No piece is joined before all that can be refused was looked at.
        num_longer = len(held.keys() & layers.keys())
        cost_twice_bytes = SEQUENCE_COST_BYTES + LAYER_COST_BYTES * num_longer
        self._check_size(name, _cost(held) + _cost(layers) - cost_twice_bytes)
        after = dict(held)
        for layer_idx, layer in layers.items():
            old = held.get(layer_idx)
            after[layer_idx] = (
                layer
                if old is None
                else LayerKv(old.key.extended(layer.key), old.value.extended(layer.value))
            )
        return self._set(name, after)

    def delete(self, name: str) -> bool:
        """Forget a sequence; whether it was there. Whoever reads it still has it."""
        self._evicted.pop(_mark(name), None)
        return self._drop(name)

    def check(self) -> None:
        """Compare what is counted with what is there.

        Raises:
            InvariantError: They differ.
        """
        costs = [_cost(sequence.layers) for sequence in self._sequences.values()]
        is_right = sum(costs) == self.num_bytes <= self._bytes_max
        is_right &= costs == [sequence.cost_bytes for sequence in self._sequences.values()]
        for sequence in self._sequences.values():
            for layer in sequence.layers.values():
                is_right &= layer.key.num_tokens == layer.value.num_tokens > 0
                for part in (layer.key, layer.value):
                    is_right &= sum(map(len, part.pieces)) == part.num_bytes
        if not is_right:
            raise InvariantError("the sequences' bytes are not what is counted")

    def _check_beginning(self, name: str) -> None:
        """Refuse to begin what may be the end of something that was evicted."""
        if _mark(name) in self._evicted:
            raise MissingError(
                f"the sequence {name} was evicted to make room: put it whole, or append with "
                "expected_length=0"
            )
        if self._has_forgotten:
            raise MissingError(
                f"there is no sequence {name}, and it may have been evicted long ago: put it "
                "whole, or append with expected_length=0"
            )

    def _check_size(self, name: str, cost_bytes: int) -> None:
        if cost_bytes > self._sequence_bytes_max:
            raise CapacityError(
                f"the sequence {name} would take {cost_bytes} bytes, and one may take "
                f"{self._sequence_bytes_max}: keep it shorter, or raise the daemon's limits"
            )

    def _set(self, name: str, layers: Mapping[int, LayerKv]) -> StoredSequence:
        after = StoredSequence(layers, _cost(layers))
        self._check_size(name, after.cost_bytes)
        self._drop(name)
        self._make_room(self._bytes_max - after.cost_bytes)
        self._sequences[name] = after
        self.num_bytes += after.cost_bytes
        self._evicted.pop(_mark(name), None)
        return after

    def _make_room(self, bytes_max: int) -> None:
        while self.num_bytes > bytes_max:
            name = next(iter(self._sequences))
            self._drop(name)
            self.num_evicted += 1
            self._evicted[_mark(name)] = None
            if len(self._evicted) > EVICTED_MAX:
                self._evicted.popitem(last=False)
                self._has_forgotten = True

    def _drop(self, name: str) -> bool:
        before = self._sequences.pop(name, None)
        if before is not None:
            self.num_bytes -= before.cost_bytes
        return before is not None


def _check_append(
    name: str, layer_idx: int, old: LayerKv | None, more: LayerKv, expected_length: int | None
) -> None:
    length = 0 if old is None else old.num_tokens
    if expected_length not in (None, length):
        raise RefusedError(
            f"layer {layer_idx} of the sequence {name} has {length} tokens, not the "
            f"{expected_length} expected: look again before you append"
        )
    if old is not None and (old.key.rows, old.value.rows) != (more.key.rows, more.value.rows):
        raise RefusedError(
            f"layer {layer_idx} of the sequence {name} has keys {old.key.rows} and values "
            f"{old.value.rows}, not {more.key.rows} and {more.value.rows}: append the same kind"
        )


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Join the last pieces while they are small and about as long as each other."""
    while len(pieces) > 1:
        last, before = pieces[-1], pieces[-2]
        if len(before) > 2 * len(last) or len(before) + len(last) > MERGE_BYTES_MAX:
            break
        pieces[-2:] = [b"".join((before, last))]
    return pieces


def _cost(layers: Mapping[int, LayerKv]) -> int:
    cost_bytes = SEQUENCE_COST_BYTES
    for layer in layers.values():
        num_pieces = len(layer.key.pieces) + len(layer.value.pieces)
        cost_bytes += LAYER_COST_BYTES + PIECE_COST_BYTES * num_pieces
        cost_bytes += layer.key.num_bytes + layer.value.num_bytes
    return cost_bytes


def _mark(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
