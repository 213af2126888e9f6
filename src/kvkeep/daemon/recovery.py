"""After a restart: which blocks of the pool are still what their headers say."""

import logging
import time

import numpy as np

from kvkeep.daemon.shell import Shell
from kvkeep.tiers.shared_memory import PoolFile, PoolView
from kvkeep.transfer.host_copy import open_copier

log = logging.getLogger(__name__)


class SlotVerifier:
    """Compares the bytes of a slot with the digests beside its header."""

    def __init__(self, view: PoolView) -> None:
        self._view = view
        self._copier = open_copier()
        self._ok = np.empty(view.geometry.layout.num_pages, dtype=np.uint8)

    def is_intact(self, slot: int) -> bool:
        """Whether every head page of the slot matches its digest."""
        layout = self._view.geometry.layout
        slots = np.array([slot], dtype=np.int64)
        addresses = self._view.page_addresses(slots, 0, layout.num_heads).reshape(-1)
        digests = np.ascontiguousarray(self._view.digests[slot]).reshape(-1, 16)
        return self._copier.verify(addresses, layout.page_bytes, digests, self._ok) == 0


def recover(shell: Shell, pool: PoolFile, *, verify: bool) -> tuple[int, int]:
    """Rebuild the ledger; returns the blocks taken over and the blocks dropped."""
    if pool.geometry is None:
        return 0, 0
    begun_s = time.perf_counter()
    is_intact = SlotVerifier(pool.view()).is_intact if verify else lambda _slot: True
    num_ready, num_dropped = shell.recover(is_intact)
    log.info(
        "pool recovered. blocks=%d dropped=%d seconds=%.3f",
        num_ready, num_dropped, time.perf_counter() - begun_s,
    )  # fmt: skip
    return num_ready, num_dropped
