"""Bodies of requests for sequences: received into memory of their own, within bounds, and sent.

Piece by piece, so that many share the event loop: a turn of it copies about one piece.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xxhash
from aiohttp import StreamReader, web

from kvkeep.core.sequences import LayerKv, Part, Piece, Rows
from kvkeep.daemon.sequences.figures import SequenceFigures
from kvkeep.model.errors import CorruptDataError, InputError
from kvkeep.protocol import tensors
from kvkeep.protocol.sequence_body import KEY, VALUE, pair_layers, tensor_name
from kvkeep.protocol.tensors import DTYPES, TensorPlace

PIECE_BYTES = 256 << 10
TURN_BYTES = 4 << 20
"""Digested before others have their turn."""


class Transfers:
    """What requests in flight hold, and no more than may be."""

    def __init__(self, bytes_max: int, figures: SequenceFigures) -> None:
        self._bytes_max = bytes_max
        self._figures = figures

    @contextlib.contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        """Hold so many bytes for a while.

        Raises:
            HTTPTooManyRequests: Others hold too much now.
        """
        figures = self._figures
        if figures["sequence_transfer_bytes"] + num_bytes > self._bytes_max:
            raise web.HTTPTooManyRequests(
                headers={"Retry-After": "1"},
                reason="too much is on its way already",
            )
        figures.count("sequence_transfer_bytes", num_bytes)
        try:
            yield
        finally:
            figures.count("sequence_transfer_bytes", -num_bytes)


class _Source:
    """Bytes of a body as they come; never more than it was said to have."""

    def __init__(self, content: StreamReader, body_bytes: int) -> None:
        self._content = content
        self.num_left = body_bytes
        self._digest = xxhash.xxh3_128()

    def digest(self) -> str:
        """Of all that came so far."""
        return self._digest.hexdigest()

    async def fill(self, target: memoryview) -> None:
        """Fill memory with the next bytes.

        Raises:
            InputError: The body has fewer.
        """
        filled = 0
        if len(target) > self.num_left:
            raise InputError(f"the body ends {len(target) - self.num_left} bytes too soon")
        while filled < len(target):
            chunk = await self._content.read(min(len(target) - filled, PIECE_BYTES))
            if not chunk:
                raise InputError(f"the body ends {self.num_left} bytes too soon")
            target[filled : filled + len(chunk)] = chunk
            self._digest.update(chunk)
            filled += len(chunk)
            self.num_left -= len(chunk)


async def receive(
    content: StreamReader, body_bytes: int, digest: str | None = None
) -> dict[int, LayerKv]:
    """Read a body into memory of its own, which is free again if it does not come whole.

    Args:
        content: The body.
        body_bytes: What it was said to have, and may have.
        digest: What its bytes were said to sum up to, if anything.

    Raises:
        InputError: It is something else than layers of a sequence.
        CorruptDataError: Its bytes are others than those that were sent.
    """
    source = _Source(content, body_bytes)
    length = memoryview(bytearray(tensors.LENGTH_BYTES))
    await source.fill(length)
    header_bytes = tensors.parse_length(length)
    header = memoryview(bytearray(min(header_bytes, source.num_left)))
    await source.fill(header)
    if header_bytes != len(header):
        raise InputError("the body ends within its header")
    places = tensors.parse_header(header, source.num_left)
    layers = pair_layers(places)
    parts = {place.name: await _receive_part(source, place) for place in places}
    if digest is not None and digest.lower() != source.digest():
        raise CorruptDataError(
            "the body's bytes are not those of its digest: they were changed on the way, send "
            "them again"
        )
    return {
        layer_idx: LayerKv(parts[key.name], parts[value.name])
        for layer_idx, (key, value) in layers.items()
    }


async def _receive_part(source: _Source, place: TensorPlace) -> Part:
    num_tokens, num_heads, head_dim = place.shape
    pieces = []
    for start in range(0, place.num_bytes, PIECE_BYTES):
        # Not a bytearray, which would be filled with zeros first.
        piece = np.empty(min(PIECE_BYTES, place.num_bytes - start), dtype=np.uint8).data
        await source.fill(piece)
        pieces.append(piece.toreadonly())
    row_bytes = num_heads * head_dim * DTYPES[place.dtype][1]
    return Part(Rows(place.dtype, num_heads, head_dim, row_bytes), num_tokens, tuple(pieces))


def lay_out(layers: Mapping[int, LayerKv]) -> tuple[bytes, int, Sequence[Piece]]:
    """What goes first, how many bytes follow it, and they, for layers of a sequence."""
    parts = [
        (tensor_name(layer_idx, name), part)
        for layer_idx, layer in sorted(layers.items())
        for name, part in ((KEY, layer.key), (VALUE, layer.value))
    ]
    header, num_bytes = tensors.make_header(
        [
            (name, part.rows.dtype, (part.num_tokens, part.rows.num_heads, part.rows.head_dim))
            for name, part in parts
        ]
    )
    return header, num_bytes, [piece for _, part in parts for piece in part.pieces]


async def digest_of(header: bytes, pieces: Sequence[Piece]) -> str:
    """XXH3-128 of a body, in hexadecimal digits."""
    digest, num_bytes = xxhash.xxh3_128(header), 0
    for piece in pieces:
        digest.update(piece)
        num_bytes += len(piece)
        if num_bytes >= TURN_BYTES:
            num_bytes = 0
            await asyncio.sleep(0)
    return digest.hexdigest()
