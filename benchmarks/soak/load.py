"""Mixed load: simulated engines that store and load documents, and prove every byte they get."""

import random
import threading
from collections import Counter

import numpy as np

from kvkeep.client.prefixes import Answer, PrefixClient, PrefixLease
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import RefusedError, UnavailableError
from kvkeep.model.ids import BlockHash
from kvkeep.model.layout import KvLayout
from tests.integration.daemons import (
    NAMESPACE,
    Daemon,
    Worker,
    hashes_of,
    opened_prefixes,
    payload_of,
)

LAYOUT = KvLayout(8, 4, 2048, 16, "bfloat16", "soak")
"""64 KiB a block."""
DOCUMENT_BLOCKS = 40
REUSED_FROM, ONCE_FROM = 0, 1 << 40
"""First numbers of blocks of the working set, and of blocks that nobody asks for again."""
REQUESTS_A_SESSION = 400
"""Then an engine leaves and comes again, as in a rolling update."""
LEASE_S = 5.0
"""Of a question whose asker forgets it: short, so that many run out during a soak."""
WAIT_S = 10.0
ONCE_SHARE, FORGET_SHARE, ABANDON_SHARE = 0.1, 0.03, 0.01


class Ledger:
    """What all engines together stored and saw."""

    def __init__(self, num_documents: int) -> None:
        self.num_documents = num_documents
        self.stored: set[BlockHash] = set()
        """Blocks of the working set that became readable at least once."""
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._num_once = 0

    def add(self, name: str, number: int = 1) -> None:
        """Count."""
        with self._lock:
            self.counts[name] += number

    def keep(self, hashes: list[BlockHash]) -> None:
        """These blocks were stored."""
        with self._lock:
            self.stored.update(hashes)

    def next_once(self) -> list[BlockHash]:
        """A document that comes once."""
        with self._lock:
            self._num_once += 1
            first = ONCE_FROM + self._num_once * DOCUMENT_BLOCKS
        return hashes_of(first, DOCUMENT_BLOCKS)

    def document(self, number: int) -> list[BlockHash]:
        """A document of the working set."""
        return hashes_of(REUSED_FROM + number * DOCUMENT_BLOCKS, DOCUMENT_BLOCKS)


class Engine(threading.Thread):
    """One simulated engine: a worker, a scheduler, and requests one after another."""

    def __init__(self, daemon: Daemon, ledger: Ledger, seed: int, ended: threading.Event) -> None:
        super().__init__(name=f"soak-engine-{seed}")
        self._daemon, self._ledger, self._ended = daemon, ledger, ended
        self._random = random.Random(seed)
        self.error: BaseException | None = None

    def run(self) -> None:
        """Sessions until the end."""
        try:
            while not self._ended.is_set():
                self._session()
        except (AssertionError, UnavailableError, RefusedError, OSError) as error:
            self.error = error

    def _session(self) -> None:
        with (
            # A name of its own: a greeting says that nothing of its engine's is being copied.
            Worker(self._daemon, layout=LAYOUT, engine_id=self.name) as worker,
            opened_prefixes(self._daemon, lease_s=LEASE_S, patience_s=WAIT_S) as client,
        ):
            for _ in range(REQUESTS_A_SESSION):
                if self._ended.is_set():
                    return
                self._request(worker, client)

    def _request(self, worker: Worker, client: PrefixClient) -> None:
        is_once = self._random.random() < ONCE_SHARE
        ledger = self._ledger
        number = self._random.randrange(ledger.num_documents)
        hashes = ledger.next_once() if is_once else ledger.document(number)
        question = client.ask(NAMESPACE, 0, hashes)
        assert question is not None, "the daemon is not there"
        ledger.add("requests")
        if self._random.random() < FORGET_SHARE:
            client.forget(question)
            return
        lease = client.answer(question, WAIT_S)
        assert client.num_late == 0, "an answer came too late"
        num_there = 0
        if not isinstance(lease, Answer):
            if self._random.random() < ABANDON_SHARE:
                # Never released: the daemon takes it back at its deadline.
                ledger.add("abandoned")
                return
            num_there = prove(worker, ledger, hashes, lease)
            client.release([lease], num_loaded=num_there, load_us=1000)
        missing = hashes[num_there:]
        if missing and worker.store(missing) == len(missing) and not is_once:
            ledger.keep(missing)
        ledger.add("stored", len(missing))


def prove(worker: Worker, ledger: Ledger, hashes: list[BlockHash], lease: PrefixLease) -> int:
    """Load blocks and compare each with what it must hold; returns how many landed in a row.

    What is missing after the lease has ended was promised by nobody: a machine that stood still for
    seconds loses blocks so, and they are counted apart.
    """
    landed, found = worker.load(hashes[: len(lease.slots)], lease.slots)
    is_over = SystemClock().now_s() >= lease.deadline_s
    num_there = 0
    for idx, is_there in enumerate(landed):
        if is_there:
            is_right = np.array_equal(found[idx], payload_of(hashes[idx], LAYOUT))
            ledger.add("right" if is_right else "wrong")
        else:
            ledger.add("outlived" if is_over else "not_landed")
        if is_there and num_there == idx:
            num_there += 1
    return num_there


def count_served(daemon: Daemon, ledger: Ledger) -> int:
    """Ask for every block that was ever stored, alone, and prove it; returns how many came."""
    with (
        Worker(daemon, layout=LAYOUT) as worker,
        opened_prefixes(daemon, lease_s=LEASE_S, patience_s=WAIT_S) as client,
    ):
        num_served = 0
        for block_hash in sorted(ledger.stored):
            question = client.ask(NAMESPACE, 0, [block_hash])
            assert question is not None, "the daemon is not there"
            lease = client.answer(question, WAIT_S)
            if not isinstance(lease, Answer):
                num_served += prove(worker, ledger, [block_hash], lease)
                client.release([lease], num_loaded=1, load_us=100)
    return num_served
