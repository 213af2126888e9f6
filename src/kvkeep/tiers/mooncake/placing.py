"""Where values lie for the client: in memory of a caller that it shares, or in a lane's scratch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvkeep.tiers.base import Parts, length_of
from kvkeep.tiers.mooncake.requests import SCRATCH_REGION, Piece
from kvkeep.tiers.mooncake.settings import REQUEST_BYTES_MAX
from kvkeep.tiers.mooncake.shared_regions import Region, address_of


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one value's parts are for the client."""

    pieces: list[Piece]
    copies: list[tuple[int, memoryview]]
    """Parts that are not in shared memory: offset in the scratch, part."""

    @property
    def shared_bytes(self) -> int:
        """Of those that are."""
        return sum(length for region, _, length in self.pieces if region != SCRATCH_REGION)


def place(values: Sequence[Parts], regions: Sequence[Region], offset: int) -> list[Placed]:
    """Find the parts that lie in regions, and room in the scratch for all others.

    The scratch is used from ``offset`` on, its parts follow each other: a value that lies there
    alone is one piece.
    """
    placed = []
    for value in values:
        one = Placed([], [])
        for part in value:
            if not part.nbytes:
                continue
            piece = _piece_in(part, regions)
            if piece is None:
                one.copies.append((offset, part))
                piece = SCRATCH_REGION, offset, part.nbytes
                offset += part.nbytes
            _append(one.pieces, piece)
        placed.append(one)
    return placed


def _piece_in(part: memoryview, regions: Sequence[Region]) -> Piece | None:
    if not regions:
        return None
    address = address_of(part)
    for region in regions:
        offset = address - region.address
        if offset >= 0 and offset + part.nbytes <= region.num_bytes:
            return region.number, offset, part.nbytes
    return None


def _append(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece, to the last one where it follows it."""
    region, offset, length = piece
    if pieces:
        last_region, last_offset, last_length = pieces[-1]
        if last_region == region and last_offset + last_length == offset:
            pieces[-1] = (region, last_offset, last_length + length)
            return
    pieces.append(piece)


def clipped(room: Parts, num_bytes: int) -> Parts:
    """Return the leading bytes of some room, without empty pieces."""
    pieces: list[memoryview] = []
    for part in room:
        piece = part[:num_bytes]
        if piece.nbytes:
            pieces.append(piece)
            num_bytes -= piece.nbytes
    return pieces


def cut(values: Sequence[Parts], value_bytes_max: int) -> Iterator[list[int]]:
    """Cut a batch into requests, as indices; leaves out what is empty or too long.

    A request has at most ``REQUEST_BYTES_MAX``, or one value.
    """
    batch: list[int] = []
    batch_bytes = 0
    for idx, value in enumerate(values):
        num_bytes = length_of(value)
        if not 0 < num_bytes <= value_bytes_max:
            continue
        if batch and batch_bytes + num_bytes > REQUEST_BYTES_MAX:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(idx)
        batch_bytes += num_bytes
    if batch:
        yield batch
