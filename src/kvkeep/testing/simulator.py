"""One node, many engine processes, one virtual clock and one seed: any run can be run again.

The core is the real one; around it stand doubles of the shell (``SimulatedDaemon``) and of the
connector's worker (``SimulatedRank``), each as disciplined as the real one and no more. The memory
between them and the auditor are in ``simulated_pool``, what goes wrong is in ``faults``.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.blocks import BlockState
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.node import NodeState
from kvkeep.model.ids import UNKNOWN_PID, BlockHash, BlockKey, Holder, Namespace
from kvkeep.testing.faults import Fault, FaultPlan, FaultyLink, Process
from kvkeep.testing.simulated_pool import Auditor, SafetyError, SimulatedSlot
from kvkeep.testing.simulated_rank import Connection, SimulatedRank
from kvkeep.testing.virtual_time import VirtualTime
from kvkeep.tiers.slot_header import SlotState

NAMESPACE = Namespace(b"simulated namespace".ljust(32, b"\0"))
TICK_S = 0.2
DAEMON_PID = 1
DRAIN_S = 60.0
"""Longer than any lease, freeze and time-out together."""


@dataclass(frozen=True)
class SimulationSettings:
    """How large the simulated node is."""

    num_slots: int = 8
    head_masks: tuple[int, ...] = (3, 3, 1, 2)
    """One process each: which of two KV heads it holds. 1 and 2 are ranks of one engine."""
    documents: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3), (0, 1, 4, 5), (6, 7, 8), (6, 9))
    """Sequences of blocks that the engines are asked about; equal beginnings are shared."""
    faults: FaultPlan = field(default_factory=FaultPlan)
    serve_s: float = 30.0
    """Virtual time until which new requests come."""

    @property
    def num_heads(self) -> int:
        """KV heads of the model."""
        return max(self.head_masks).bit_length()


class SimulatedDaemon:
    """The shell: sessions, effects, watched processes, death and recovery."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._num_sessions = 0
        self._connections: list[Connection] = []
        self._watched: dict[int, Process] = {}
        self.process = Process(DAEMON_PID, simulation.time, simulation.chance)
        self.node: NodeState | None = None
        self._recover()

    # ---- life

    def _recover(self) -> None:
        settings = self._simulation.settings
        self._watched = {}
        self.node = NodeState(settings.num_slots, settings.num_heads, LruPolicy())
        for idx, slot in enumerate(self._simulation.slots):
            if slot.state is SlotState.WRITING:
                # Without one pid to wait for, every process that may have mapped the pool counts.
                pids = list(self._simulation.processes) if slot.pid == UNKNOWN_PID else [slot.pid]
                for pid in pids:
                    self.handle(on.WriteRecovered(idx, pid))
            elif slot.state is SlotState.READY and slot.key is not None and slot.is_intact:
                self.handle(on.BlockRecovered(slot.key, idx))
            else:
                slot.state = SlotState.FREE
        self.process.after(TICK_S, self._tick)

    def _tick(self) -> None:
        self.handle(on.TimePassed())
        self.process.after(TICK_S, self._tick)

    def die(self) -> None:
        """Be killed at once, and started again a while later."""
        self.process.kill()
        self.node = None
        self._simulation.auditor.ended(set())
        for connection in self._connections:
            connection.link.cut()
        self._connections = []
        self._simulation.time.after(self._simulation.chance.uniform(0.1, 3.0), self._restart)

    def _restart(self) -> None:
        self._simulation.log(DAEMON_PID, "restarts")
        self.process = Process(DAEMON_PID, self._simulation.time, self._simulation.chance)
        self._recover()

    # ---- sessions

    def accept(self, process: Process, welcomed: Callable[[Connection], None]) -> Connection | None:
        """Open a link for a worker and greet it; None if no daemon runs."""
        if not self.process.is_alive:
            return None
        simulation = self._simulation
        self._num_sessions += 1
        link = FaultyLink(simulation.time, simulation.chance, (self.process, process))
        connection = Connection(Holder(self._num_sessions, process.pid), link, self)
        self._connections.append(connection)
        process.when_dead(link.cut)
        link.when_lost(0, lambda: self._left(connection))

        def greet() -> None:
            # A worker connects only when none of its copies is in motion.
            self.handle(on.HolderQuiet(process.pid, connection.holder.session_id))
            link.send(1, lambda: welcomed(connection))

        link.send(0, greet)
        return connection

    def _left(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
        self.handle(on.HolderLeft(connection.holder))

    def cut_some_link(self, *, delay_s: float = 0.0) -> None:
        """Cut a link, or make its next message late."""
        if not self._connections:
            return
        link = self._simulation.chance.choice(self._connections).link
        if delay_s:
            link.extra_delay_s = delay_s
        else:
            link.cut()

    # ---- the core

    def handle(self, event: on.Event) -> do.Effect | None:
        """Feed the core, carry out its effects, have everything audited; return the reply."""
        if self.node is None:
            return None
        simulation = self._simulation
        effects = self.node.handle(event, now_s=simulation.time.now_s())
        if effects or not isinstance(event, on.TimePassed):
            simulation.log(DAEMON_PID, (event, effects))
        reply: do.Effect | None = None
        for effect in effects:
            if isinstance(effect, do.MarkWriting | do.MarkReady | do.MarkFree | do.WatchProcess):
                self._carry_out(effect)
            else:
                reply = effect
        simulation.auditor.ended({lease.lease_id for lease in self.node.reads})
        if isinstance(event, on.ReadAsked) and isinstance(reply, do.ReplyRead):
            keys = [BlockKey(event.namespace, h, event.group_idx) for h in event.hashes]
            simulation.auditor.granted(reply, keys)
        simulation.auditor.check_lent()
        self.node.check()
        return reply

    def _carry_out(
        self, effect: do.MarkWriting | do.MarkReady | do.MarkFree | do.WatchProcess
    ) -> None:
        slots = self._simulation.slots
        match effect:
            case do.MarkWriting(idx, key, _, pid):
                slots[idx].state, slots[idx].key, slots[idx].pid = SlotState.WRITING, key, pid
            case do.MarkReady(idx, key):
                slots[idx].state, slots[idx].key = SlotState.READY, key
                slots[idx].is_rotten = False
            case do.MarkFree(idx):
                slots[idx].state, slots[idx].key = SlotState.FREE, None
            case do.WatchProcess(pid):
                self._watch(pid)

    def _watch(self, pid: int) -> None:
        process = self._simulation.processes.get(pid)
        if process is None or pid in self._watched:
            return
        self._watched[pid] = process
        me = self.process

        def quiet() -> None:
            self._watched.pop(pid, None)
            self.handle(on.HolderQuiet(pid))

        process.when_dead(lambda: me.after(self._simulation.chance.uniform(0.0, 0.1), quiet))


class Simulation:
    """A run of one seed."""

    def __init__(self, seed: int, settings: SimulationSettings | None = None) -> None:
        self.settings = settings or SimulationSettings()
        self.time = VirtualTime()
        self.chance = Random(seed)
        self.events: list[tuple[float, int, object]] = []
        """Everything that happened: when, by its pid to whom, and what."""
        num_heads = self.settings.num_heads
        self.slots = [SimulatedSlot(num_heads) for _ in range(self.settings.num_slots)]
        self.auditor = Auditor(self.slots)
        self.processes: dict[int, Process] = {}
        self.ranks: list[SimulatedRank] = []
        self.is_closing = False
        self.documents = [
            [BlockKey(NAMESPACE, _hash(idx)) for idx in document]
            for document in self.settings.documents
        ]
        self.daemon = SimulatedDaemon(self)
        for head_mask in self.settings.head_masks:
            self._start_rank(head_mask)

    def log(self, pid: int, what: object) -> None:
        """Note what happened to a process, or to none (0)."""
        self.events.append((self.time.now_s(), pid, what))

    def story(self, num_events: int) -> str:
        """The last events, one line each."""
        return "\n".join(f"{at:.6f} {pid}: {what}" for at, pid, what in self.events[-num_events:])

    def _start_rank(self, head_mask: int) -> None:
        process = Process(100 + len(self.processes), self.time, self.chance)
        self.processes[process.pid] = process
        rank = SimulatedRank(self, process, head_mask)
        self.ranks.append(rank)
        rank.start()

    def _strike(self, fault: Fault) -> None:
        self.log(0, fault)
        seconds = self.chance.uniform(0.2, 5.0)
        running = [rank for rank in self.ranks if rank.process.is_alive]
        match fault:
            case Fault.ENGINE_FREEZE if running:
                self.chance.choice(running).process.freeze(seconds)
            case Fault.ENGINE_DEATH if running:
                rank = self.chance.choice(running)
                rank.process.kill()
                self.time.after(seconds, lambda: self._start_rank(rank.head_mask))
            case Fault.DAEMON_FREEZE:
                self.daemon.process.freeze(seconds)
            case Fault.DAEMON_DEATH if self.daemon.process.is_alive:
                self.daemon.die()
            case Fault.LINK_CUT:
                self.daemon.cut_some_link()
            case Fault.LINK_DELAY:
                self.daemon.cut_some_link(delay_s=seconds / 5)
            case Fault.CLEAR:
                self.daemon.process.after(0.0, self._clear)
            case Fault.ROT:
                self._rot(self.chance.choice(self.slots))

    def _clear(self) -> None:
        self.daemon.handle(on.ClearAsked(0))

    def _rot(self, slot: SimulatedSlot) -> None:
        # Bytes under a pen may be overwritten again, so only what is stored is counted as rotten.
        if slot.state is SlotState.READY:
            page = self.chance.choice(slot.pages)
            page[0] = bytes([page[0][0] ^ 1]) + page[0][1:]
            slot.is_rotten = True

    def run(self) -> "Simulation":
        """Serve under faults, then without, then stop everything and see that nothing is left.

        Raises:
            SafetyError: A promise was broken; ``events`` tells how.
        """
        self.settings.faults.plan(self.time, self.chance, self._strike)
        self.time.run_until(self.settings.serve_s)
        self.is_closing = True
        self.time.run_until(self.settings.serve_s + DRAIN_S)
        for rank in self.ranks:
            if rank.process.is_alive and not rank.is_idle:
                raise SafetyError(f"a request never ended. pid={rank.process.pid}")
        for process in self.processes.values():
            process.kill()
        self.time.run_until(self.settings.serve_s + 2 * DRAIN_S)
        self._check_drained()
        return self

    def _check_drained(self) -> None:
        node = self.daemon.node
        if node is None or len(node.reads) or len(node.writes):
            raise SafetyError("leases are left though every process is gone")
        left = [
            (slot.idx, slot.state.value)
            for slot in node.ledger.slots
            if slot.state not in (BlockState.FREE, BlockState.READY)
        ]
        if left:
            raise SafetyError(f"slots are left out of use though every process is gone: {left}")

    @property
    def num_loaded(self) -> int:
        """Blocks that readers got, right and whole."""
        return sum(rank.num_loaded for rank in self.ranks)

    @property
    def num_fenced(self) -> int:
        """Commits that came too late and were refused."""
        return sum(rank.num_fenced for rank in self.ranks)


def _hash(idx: int) -> BlockHash:
    return BlockHash(hashlib.blake2b(b"block %d" % idx, digest_size=32).digest())
