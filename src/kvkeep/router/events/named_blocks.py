"""What a holder calls its blocks in one place, and how often it has each of them.

An engine and each of its ranks give names of their own to blocks, and a removal says nothing else.
Two requests that computed one prefix at the same time both store it under one name, and each copy
is removed by itself.

Threading and blocking: the event loop's thread; never blocks. Bounded by whoever fills a table: it
says how much room there is.
"""

from collections.abc import Iterable
from itertools import islice

FORGOTTEN_AT_ONCE = 256
"""One part in so many goes at a time where there is no room: finding the oldest entry of a dict
means skipping those deleted before it, which is cheap for a thousand at once and dear for each
alone."""


class NamedBlocks:
    """One holder's blocks in one place: its cache, or the tiers behind it."""

    __slots__ = ("_blocks", "_copies")

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        """From a name to the hash of the block's tokens, the oldest name first."""
        self._copies: dict[int, int] = {}
        """Only of blocks that are held more than once."""

    def __len__(self) -> int:
        """Names known, copies not counted."""
        return len(self._blocks)

    def block_of(self, name: int) -> int | None:
        """Return the hash of the tokens that a name stands for."""
        return self._blocks.get(name)

    def store(self, names: Iterable[int], blocks: Iterable[int]) -> list[int]:
        """Blocks are held once more than before.

        Returns:
            Those that had one of these names until now, each as often as it was held. A holder
            never gives one name to two blocks; if it does, the later one counts.
        """
        held, copies = self._blocks, self._copies
        gone: list[int] = []
        for name, block in zip(names, blocks, strict=True):
            known = held.get(name)
            if known == block:
                copies[name] = copies.get(name, 1) + 1
                continue
            if known is not None:
                gone += self._forget(name)
            held[name] = block
        return gone

    def remove(self, names: Iterable[int]) -> tuple[list[int], list[int]]:
        """A copy of each is gone.

        Returns:
            The blocks of which none is left, and those of which there are other copies; of names
            that nobody has heard neither.
        """
        held, copies = self._blocks, self._copies
        gone: list[int] = []
        fewer: list[int] = []
        for name in names:
            num_copies = copies.pop(name, 1)
            if num_copies > 1:
                fewer.append(held[name])
                if num_copies > 2:
                    copies[name] = num_copies - 1
                continue
            block = held.pop(name, None)
            if block is not None:
                gone.append(block)
        return gone, fewer

    def forget_oldest(self, room: int) -> list[int]:
        """Have no more than so many names, and some fewer if any had to go.

        Returns:
            What is forgotten, each block as often as it was held.
        """
        return [block for name in oldest(self._blocks, room) for block in self._forget(name)]

    def clear(self) -> list[int]:
        """Forget everything; returns each block as often as it was held."""
        gone = [block for name in list(self._blocks) for block in self._forget(name)]
        # A dict that was emptied entry by entry keeps its size.
        self._blocks, self._copies = {}, {}
        return gone

    def _forget(self, name: int) -> list[int]:
        return [self._blocks.pop(name)] * self._copies.pop(name, 1)

    def check(self) -> None:
        """Raise AssertionError if the tables do not agree."""
        assert self._copies.keys() <= self._blocks.keys()
        assert all(count > 1 for count in self._copies.values())


def oldest(entries: dict[int, int] | dict[int, None], room: int) -> list[int]:
    """Return the keys to remove, oldest first, where there are more entries than ``room``.

    Enough of them to be some way below it afterwards.
    """
    if len(entries) <= room:
        return []
    return list(islice(entries, len(entries) - room + room // FORGOTTEN_AT_ONCE))
