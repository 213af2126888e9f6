"""A rank of an engine as a simulation sees it: loads and stores in steps, with a connector's rules.

The rules are those of the real worker: digests are captured before headers are compared and bytes
are copied; a copy that begins late does not begin; nothing is committed over a new connection; and
a new connection is opened only when no copy is in motion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.model.ids import BlockKey, Holder, LeaseId
from kvkeep.testing.faults import FaultyLink, Process
from kvkeep.testing.simulated_pool import HALVES, Auditor, SimulatedSlot, digest_of, true_half
from kvkeep.testing.virtual_time import VirtualTime
from kvkeep.tiers.slot_header import SlotState

LEASE_S = 1.5
CALL_TIMEOUT_S = 1.0
RECONNECT_S = 0.3
THINK_S = 0.4
STEP_S = 0.03
"""At most, for one step of a copy."""
FAILED_COPIES = 0.05
"""Share of blocks that a rank fails to store."""


class Daemon(Protocol):
    """Whom a rank talks to."""

    def handle(self, event: on.Event) -> do.Effect | None:
        """Take in an event and return the reply, if it has one."""
        ...

    def accept(
        self, process: Process, welcomed: "Callable[[Connection], None]"
    ) -> "Connection | None":
        """Open a link and greet; None if nobody listens."""
        ...


class Surroundings(Protocol):
    """What a rank sees of the simulation."""

    time: VirtualTime
    chance: Random
    slots: list[SimulatedSlot]
    auditor: Auditor
    documents: list[list[BlockKey]]
    is_closing: bool

    @property
    def daemon(self) -> Daemon:
        """The node's daemon."""
        ...

    def log(self, pid: int, what: object) -> None:
        """Note what a process did."""
        ...


@dataclass(frozen=True, eq=False)
class Connection:
    """One session with the daemon."""

    holder: Holder
    link: FaultyLink
    daemon: Daemon

    def ask(self, event: on.Event, answer: Callable[[do.Effect | None], None]) -> None:
        """Send an event; its reply arrives later, or never."""

        def arrive() -> None:
            reply = self.daemon.handle(event)
            self.link.send(1, lambda: answer(reply))

        self.link.send(0, arrive)

    def tell(self, event: on.Event) -> None:
        """Send an event that has no reply."""

        def arrive() -> None:
            self.daemon.handle(event)

        self.link.send(0, arrive)


class SimulatedRank:
    """Asks for a document, loads what there is, stores its heads of the rest, again and again."""

    def __init__(self, around: Surroundings, process: Process, head_mask: int) -> None:
        self._around = around
        self.process = process
        self.head_mask = head_mask
        self._heads = [idx for idx in range(head_mask.bit_length()) if head_mask >> idx & 1]
        self._connection: Connection | None = None
        self._waiting: object | None = None
        """Stands for the answer that is waited for."""
        self._keys: list[BlockKey] = []
        self._asked_s = 0.0
        self.is_idle = False
        self.num_loaded = 0
        self.num_fenced = 0

    # ---- requests

    def start(self) -> None:
        """Take the next request after a while."""
        self.is_idle = True
        self.process.after(self._around.chance.uniform(0.0, THINK_S), self._begin)

    def _begin(self) -> None:
        if self._around.is_closing:
            return
        self.is_idle = False
        if self._connection is None:
            self._connect()
            return
        self._keys = self._around.chance.choice(self._around.documents)
        key = self._keys[0]
        self._call(
            on.ReadAsked(
                0, self._connection.holder, key.namespace, key.group_idx,
                [key.block_hash for key in self._keys], self._around.time.now_s() + LEASE_S,
            ),
            self._load,
        )  # fmt: skip

    # ---- the connection

    def _connect(self) -> None:
        self._waiting = token = object()

        def welcomed(connection: Connection) -> None:
            if self._waiting is token and not connection.link.is_cut:
                self._waiting = None
                self._connection = connection
                self.start()

        attempt = self._around.daemon.accept(self.process, welcomed)
        if attempt is not None:
            attempt.link.when_lost(1, lambda: self._lost(attempt))

        def give_up() -> None:
            if self._waiting is token:
                self._waiting = None
                if attempt is not None:
                    attempt.link.cut()
                self.process.after(RECONNECT_S, self.start)

        self.process.after(CALL_TIMEOUT_S, give_up)

    def _lost(self, connection: Connection) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        if self._waiting is not None:
            self._waiting = None
            self.start()

    def _call(self, event: on.Event, answered: Callable[[do.Effect], None]) -> None:
        """Ask; go on with the answer, or give the connection up when there is none in time."""
        connection = self._connection
        assert connection is not None
        self._waiting = token = object()

        def arrived(reply: do.Effect | None) -> None:
            if self._waiting is token and reply is not None:
                self._waiting = None
                answered(reply)

        def give_up() -> None:
            if self._waiting is token:
                connection.link.cut()
                self._lost(connection)

        connection.ask(event, arrived)
        self.process.after(CALL_TIMEOUT_S, give_up)

    # ---- copies

    def _take(self, steps: list[Callable[[], None]], done: Callable[[], None]) -> None:
        """Take steps one after the other, with time between them; then go on."""
        if not steps:
            done()
            return

        def step() -> None:
            steps[0]()
            self._take(steps[1:], done)

        self.process.after(self._around.chance.uniform(0.0, STEP_S), step)

    def _load(self, reply: do.Effect) -> None:
        assert isinstance(reply, do.ReplyRead)
        connection = self._connection
        slots = list(reply.slots)
        pool = self._around.slots
        captured: dict[tuple[int, int], bytes] = {}
        readable: list[bool] = []
        copied: dict[tuple[int, int], list[bytes]] = {}

        def capture() -> None:
            for idx in slots:
                captured.update({(idx, head): pool[idx].digests[head] for head in self._heads})

        def compare() -> None:
            for idx, key in zip(slots, self._keys, strict=False):
                readable.append(pool[idx].state is SlotState.READY and pool[idx].key == key)

        def copy(idx: int, head: int, half: int) -> None:
            copied.setdefault((idx, head), [b""] * HALVES)[half] = pool[idx].pages[head][half]

        steps: list[Callable[[], None]] = [capture, compare]
        steps += [
            lambda idx=idx, head=head, half=half: copy(idx, head, half)  # type: ignore[misc]
            for idx in slots
            for head in self._heads
            for half in range(HALVES)
        ]

        def done() -> None:
            good = [
                is_readable and self._verify(reply.lease_id, idx, key, captured, copied)
                for idx, key, is_readable in zip(slots, self._keys, readable, strict=False)
            ]
            self._loaded(connection, reply.lease_id, good)

        self._take(steps if slots else [], done)

    def _verify(
        self,
        lease_id: LeaseId,
        idx: int,
        key: BlockKey,
        captured: dict[tuple[int, int], bytes],
        copied: dict[tuple[int, int], list[bytes]],
    ) -> bool:
        auditor = self._around.auditor
        for head in self._heads:
            if not auditor.check_read(key, head, copied[idx, head], captured[idx, head]):
                if self._connection is not None:
                    auditor.check_refusal(lease_id, idx)
                return False
        return True

    def _loaded(self, connection: Connection | None, lease_id: LeaseId, good: list[bool]) -> None:
        num_good = good.index(False) if False in good else len(good)
        self.num_loaded += num_good
        self._around.log(self.process.pid, ("loaded", num_good, "of", len(good)))
        if self._connection is None or self._connection is not connection:
            self.start()
            return
        bad = [key.block_hash for key, ok in zip(self._keys, good, strict=False) if not ok]
        namespace, group_idx = self._keys[0].namespace, self._keys[0].group_idx
        if bad:
            connection.tell(on.BlocksFoundCorrupt(namespace, group_idx, bad))
        connection.tell(on.ReadFinished(connection.holder, [lease_id]))
        rest = [key.block_hash for key in self._keys[num_good:]]
        if not rest:
            self.start()
            return
        self._keys = self._keys[num_good:]
        self._asked_s = self._around.time.now_s()
        deadline_s = self._asked_s + LEASE_S
        self._call(
            on.StoreAsked(
                0, connection.holder, namespace, group_idx, rest, self.head_mask, deadline_s
            ),
            self._store,
        )

    def _store(self, reply: do.Effect) -> None:
        assert isinstance(reply, do.ReplyStore)
        connection = self._connection
        if not reply.lease_id or connection is None:
            self.start()
            return
        pairs = zip(reply.slots, self._keys, strict=True)
        granted = [(idx, key) for idx, key in pairs if idx != do.NO_SLOT]
        is_timely = self._around.time.now_s() - self._asked_s < LEASE_S / 2
        chance = self._around.chance
        is_stored = [is_timely and chance.random() >= FAILED_COPIES for _ in granted]
        steps: list[Callable[[], None]] = []
        for (idx, key), ok in zip(granted, is_stored, strict=True):
            for head in self._heads if ok else ():
                steps += self._page_steps(idx, key, head)

        def done() -> None:
            if self._connection is not connection:
                self.start()
                return
            event = on.StoreFinished(0, connection.holder, reply.lease_id, is_stored)
            self._call(event, self._committed)

        self._take(steps, done)

    def _page_steps(self, idx: int, key: BlockKey, head: int) -> list[Callable[[], None]]:
        """Steps that write one head page and its digest."""
        slot, auditor = self._around.slots[idx], self._around.auditor
        halves = [true_half(key, head, half) for half in range(HALVES)]

        def write(half: int) -> None:
            auditor.check_write(idx, key)
            slot.pages[head][half] = halves[half]

        def seal() -> None:
            auditor.check_write(idx, key)
            slot.digests[head] = digest_of(halves)

        return [lambda: write(0), lambda: write(1), seal]

    def _committed(self, reply: do.Effect) -> None:
        assert isinstance(reply, do.ReplyStored)
        self.num_fenced += reply.is_fenced
        self.start()
