"""Brings cartridges to the pool: a thread of a rank reads the file and stores its heads as blocks.

The rank does it because only its engine knows what a page's bytes are. What arrives is stored and
lent like any block; the engine's own memory is not touched.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvkeep.cartridges.contents import Contents
from kvkeep.cartridges.file_format import read_cartridge
from kvkeep.connector.metadata import DepositJob, DepositResult
from kvkeep.model.errors import CorruptDataError, KvkeepError, RefusedError, UnavailableError
from kvkeep.model.ids import HASH_BYTES

if TYPE_CHECKING:
    from kvkeep.connector.cartridges.scratch import Scratch
    from kvkeep.connector.worker.attachment import Attachment
    from kvkeep.connector.worker.stores import Batches

log = logging.getLogger(__name__)

NO_DEPOSITS = "this engine's memory can't be filled from a file"
NO_DAEMON = "there is no daemon whose pool this engine uses"


@dataclass(frozen=True)
class Bench:
    """Where a rank makes pages, and how they get to the pool."""

    scratch: "Scratch"
    batches: "Batches"
    """Of the scratch's memory."""
    snapshot: Callable[[], Any]
    """Marks what was written there, for the copy."""


class Depositor:
    """Works through deposits in order; each is reported exactly once."""

    def __init__(self, attachment: "Attachment", make_bench: Callable[[], Bench]) -> None:
        """Begin the thread.

        Args:
            attachment: Of this rank.
            make_bench: Called on the thread, with the first deposit.
        """
        self._attachment = attachment
        self._make_bench = make_bench
        self._bench: Bench | None = None
        self._queue: queue.SimpleQueue[tuple[DepositJob, bytes] | None] = queue.SimpleQueue()
        self._ended: deque[tuple[int, DepositResult]] = deque()
        self._last: tuple[str, Contents] | None = None
        self._thread = threading.Thread(target=self._run, name="kvkeep-deposit", daemon=True)
        self._thread.start()

    def submit(self, job: DepositJob, namespace: bytes) -> None:
        """Queue a deposit; ``poll`` will name it exactly once."""
        self._queue.put((job, namespace))

    def poll(self) -> dict[int, DepositResult]:
        """Deposits that ended since the last call."""
        if not self._thread.is_alive():
            # Something unforeseen ended it; what was still to come will not.
            while not self._queue.empty():
                queued = self._queue.get_nowait()
                if queued is not None:
                    self._end(queued[0], "the thread that reads cartridges has ended")
        found = {}
        while self._ended:
            job_id, result = self._ended.popleft()
            found[job_id] = result
        return found

    def close(self) -> None:
        """Stop after the deposit at hand."""
        self._queue.put(None)
        self._thread.join(timeout=10.0)

    def _end(self, job: DepositJob, error: str) -> None:
        self._ended.append((job.job_id, DepositResult(1, error)))

    def _run(self) -> None:
        while (queued := self._queue.get()) is not None:
            job, namespace = queued
            error = "it failed in an unforeseen way, see the engine's log"
            try:
                self._deposit(job, namespace)
                error = ""
            except (KvkeepError, OSError) as reason:
                error = str(reason)
                log.warning("kvkeep: a cartridge was not brought: %s", error)
            finally:
                self._end(job, error)
                if self._queue.empty():
                    self._last = None

    def _deposit(self, job: DepositJob, namespace: bytes) -> None:
        contents = self._read(job)
        if self._bench is None:
            self._bench = self._make_bench()
        bench = self._bench
        num_blocks = len(job.hashes) // HASH_BYTES
        for first in range(0, num_blocks, bench.scratch.num_blocks):
            count = min(bench.scratch.num_blocks, num_blocks - first)
            hashes = job.hashes[first * HASH_BYTES : (first + count) * HASH_BYTES]
            self._store(bench, contents, namespace, hashes, first)

    def _store(
        self, bench: Bench, contents: Contents, namespace: bytes, hashes: bytes, first: int
    ) -> None:
        connection, pool = self._attachment.link.connection, self._attachment.pool
        if connection is None or pool is None or not pool.is_proven:
            raise UnavailableError(NO_DAEMON)
        count = len(hashes) // HASH_BYTES
        bench.scratch.fill(contents, first, count)
        try:
            bench.batches.store(connection, pool, namespace, hashes, range(count), bench.snapshot())
        except (UnavailableError, RefusedError) as error:
            self._attachment.link.lost(connection, error)
            raise

    def _read(self, job: DepositJob) -> Contents:
        """A cartridge, every byte checked; the last one is kept while others wait for it."""
        if self._last is not None and self._last[0] == job.digest:
            return self._last[1]
        cartridge = read_cartridge(Path(job.path))
        if cartridge.head.digest != job.digest:
            raise CorruptDataError(f"{job.path} is another cartridge by now: register it anew")
        self._last = (job.digest, cartridge.contents)
        return cartridge.contents
