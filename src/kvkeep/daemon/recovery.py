"""After a restart: which blocks of the pool are still what their headers say."""

import logging
import os
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvkeep.daemon.shell import Shell
from kvkeep.tiers.shared_memory import PoolFile, PoolView
from kvkeep.transfer.host_copy import open_copier

log = logging.getLogger(__name__)

BATCH_BYTES = 256 << 20
"""Verified in one call: enough for every thread, little enough for the arrays of addresses."""
THREADS_MAX = 8
"""Nobody else works while the daemon recovers; memory is saturated by then."""


class SlotVerifier:
    """Compares the bytes of slots with the digests beside their headers."""

    def __init__(self, view: PoolView) -> None:
        self._view = view
        self._copier = open_copier(num_threads=min(THREADS_MAX, os.cpu_count() or 1))
        self._batch_slots = max(1, BATCH_BYTES // view.geometry.layout.block_bytes)

    def find_intact(self, slots: Sequence[int]) -> set[int]:
        """Those of these slots of which every head page matches its digest."""
        intact: set[int] = set()
        for start in range(0, len(slots), self._batch_slots):
            batch = np.array(slots[start : start + self._batch_slots], dtype=np.int64)
            intact.update(batch[self._verify(batch)].tolist())
        return intact

    def _verify(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        layout = self._view.geometry.layout
        addresses = self._view.page_addresses(slots, 0, layout.num_heads).reshape(-1)
        digests = np.ascontiguousarray(self._view.digests[slots]).reshape(-1, 16)
        ok = np.empty(len(addresses), dtype=np.bool_)
        self._copier.verify(addresses, layout.page_bytes, digests, ok)
        is_intact: npt.NDArray[np.bool_] = np.all(ok.reshape(len(slots), -1), axis=1)
        return is_intact


def recover(shell: Shell, pool: PoolFile, *, verify: bool) -> tuple[int, int]:
    """Rebuild the ledger; returns the blocks taken over and the blocks dropped."""
    if pool.geometry is None:
        return 0, 0
    begun_s = time.perf_counter()
    num_ready, num_dropped = shell.recover(SlotVerifier(pool.view()).find_intact if verify else set)
    log.info(
        "pool recovered. blocks=%d dropped=%d seconds=%.3f",
        num_ready, num_dropped, time.perf_counter() - begun_s,
    )  # fmt: skip
    return num_ready, num_dropped
