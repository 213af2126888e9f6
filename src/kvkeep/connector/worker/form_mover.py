"""Moves blocks between engine memory on a CPU and a pool that keeps them in another form.

A few pages at a time: out of the engine, into their form, from there to the pool with digests; and
back, where a page is brought out of its form only when its bytes were found right. What the pool
holds is digested and compared as it lies there, like any other block.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.connector.worker.movers import BlockingLoads, Digests, write_digests
from kvkeep.connector.worker.views import EngineMemory
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.transfer.host_copy import open_copier
from kvkeep.transfer.int8_form import Int8Form

BATCH_BYTES = 512 << 10
"""Of pages as the engine keeps them, at once: small enough that a core's cache holds the work."""


class _Buffer:
    """Pages in their form, on their way."""

    def __init__(self, num_pages: int, form: Int8Form) -> None:
        self.pages = np.empty((num_pages, form.stored_bytes), dtype=np.uint8)
        offsets = np.arange(num_pages, dtype=np.uint64) * np.uint64(form.stored_bytes)
        self.addresses = offsets + np.uint64(self.pages.ctypes.data)


class FormMover(BlockingLoads):
    """See BlockMover. Stores run on one thread at a time, loads on the main thread."""

    def __init__(self, memory: EngineMemory, form: Int8Form) -> None:
        self.form = form
        self._memory = memory
        self._blocks_at_once = max(1, BATCH_BYTES // (memory.num_heads * form.page_bytes))
        num_pages = self._blocks_at_once * memory.num_heads
        self._outgoing, self._incoming = _Buffer(num_pages, form), _Buffer(num_pages, form)
        self._decoded = np.empty((num_pages, form.page_bytes), dtype=np.uint8)
        self._copier = open_copier()
        self._engine_pages = [_engine_pages(tensor) for tensor in memory.tensors]

    def snapshot(self) -> None:
        """Nothing to mark: the forward pass of a CPU engine is over when it returns."""

    def _batches(self, num_blocks: int) -> Iterator[tuple[int, slice]]:
        """Layers, and positions of blocks in a job."""
        for layer in range(len(self._engine_pages)):
            for start in range(0, num_blocks, self._blocks_at_once):
                yield layer, slice(start, min(start + self._blocks_at_once, num_blocks))

    def _pool_pages(self, pool: PoolView, slots: Sequence[int]) -> npt.NDArray[np.uint64]:
        memory = self._memory
        wanted = np.asarray(slots, dtype=np.int64)
        return pool.page_addresses(wanted, memory.first_head, memory.num_heads)

    def store(
        self, pool: PoolView, block_ids: Sequence[int], slots: Sequence[int], after: Any
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover. A block with a value that is not finite is not stored."""
        form, target = self.form, self._pool_pages(pool, slots)
        blocks = np.asarray(block_ids, dtype=np.int64)
        digests = np.empty((*target.shape, 16), dtype=np.uint8)
        is_stored = np.ones(len(blocks), dtype=np.bool_)
        for layer, batch in self._batches(len(blocks)):
            pages = self._engine_pages[layer][blocks[batch]]
            num_blocks, num_heads, _ = pages.shape
            num_pages = num_blocks * num_heads
            encoded = self._outgoing.pages[:num_pages]
            is_finite = form.encode(pages.reshape(num_pages, -1), encoded)
            is_stored[batch] &= is_finite.reshape(num_blocks, num_heads).all(axis=1)
            written = np.empty((num_pages, 16), dtype=np.uint8)
            self._copier.store(
                self._outgoing.addresses[:num_pages],
                np.ascontiguousarray(target[batch, layer]).reshape(-1),
                form.stored_bytes,
                written,
            )
            digests[batch, layer] = written.reshape(num_blocks, num_heads, 16)
        write_digests(pool, slots, self._memory, digests)
        return is_stored

    def load(
        self, pool: PoolView, slots: Sequence[int], block_ids: Sequence[int], digests: Digests
    ) -> npt.NDArray[np.bool_]:
        """See BlockMover. A page with another digest leaves the engine's memory as it was."""
        source = self._pool_pages(pool, slots)
        blocks = np.asarray(block_ids, dtype=np.int64)
        landed = np.ones(len(blocks), dtype=np.bool_)
        for layer, batch in self._batches(len(blocks)):
            expected = np.ascontiguousarray(digests[batch, layer]).reshape(-1, 16)
            ok = np.empty(len(expected), dtype=np.bool_)
            self._copier.load(
                np.ascontiguousarray(source[batch, layer]).reshape(-1),
                self._incoming.addresses[: len(ok)],
                self.form.stored_bytes,
                expected,
                ok,
            )
            self._bring_back(layer, blocks[batch], ok)
            landed[batch] &= ok.reshape(-1, self._memory.num_heads).all(axis=1)
        return landed

    def _bring_back(
        self, layer: int, blocks: npt.NDArray[np.int64], ok: npt.NDArray[np.bool_]
    ) -> None:
        """Bring pages that arrived out of their form, into the engine.

        Args:
            layer: Of the pages.
            blocks: Engine blocks, int64 ``[num_blocks]``.
            ok: bool ``[num_blocks * num_heads]``: which pages arrived; a page that is not in this
                form is struck out.
        """
        incoming, decoded = self._incoming.pages[: len(ok)], self._decoded[: len(ok)]
        chosen = np.flatnonzero(ok)
        if len(chosen) < len(ok):
            incoming, decoded = incoming[chosen], decoded[: len(chosen)]
        is_readable = self.form.decode(incoming, decoded)
        if not is_readable.all():
            ok[chosen[~is_readable]] = False
            chosen, decoded = chosen[is_readable], decoded[is_readable]
        num_heads = self._memory.num_heads
        self._engine_pages[layer][blocks[chosen // num_heads], chosen % num_heads] = decoded


def _engine_pages(tensor: Any) -> npt.NDArray[np.uint8]:
    """A layer's pages where they lie, uint8 ``[num_blocks, num_heads, page_bytes]``."""
    import torch

    num_blocks, num_heads = tensor.shape[:2]
    pages: npt.NDArray[np.uint8] = tensor.view(torch.uint8).view(num_blocks, num_heads, -1).numpy()
    return pages
