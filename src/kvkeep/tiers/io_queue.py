"""A bounded front of one tier for a thread that may not wait: the daemon's event loop.

What it is: threads that make a tier's blocking calls, a queue before them with limits on jobs and
bytes, and a circuit breaker. Who submits is told at once if the queue is full or the tier is left
alone.

Life of one job: ``submit_...`` takes it or refuses; a thread makes the call; ``done`` is called
once, on that thread, when the call has really returned. Nothing is abandoned: a read that was given
up could still write into its room, so until ``done`` the job's memory is in use, however late it
is. A job that never began (the breaker opened, it waited too long, the queue was closed) ends with
an error too: on a thread of the queue, or inside ``sweep`` or ``close``.

The owner must call ``sweep`` several times a second: nothing else notices that a call hangs.
``done`` must be quick and must not raise; it is called without a lock and may submit.

Reads and probes go before writes and deletes, and one thread is kept from the latter (if there are
several), so that storing does not delay loading. Between jobs of several threads there is no order.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from kvkeep.core.breaker import Breaker, BreakerState
from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, Probes, Tier, length_of

NUM_THREADS_MAX = 64

Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Answer_co]):
    """How a job ended: an answer or an error."""

    answer: Answer_co | None
    """What the tier's method returned; None for a delete and after an error."""
    error: UnavailableError | None = None
    """Why there is no answer."""


@runtime_checkable
class Estimates(Protocol):
    """A tier that knows how fast it is; ``MeteredTier`` does."""

    def estimate_read_s(self, num_bytes: int) -> float | None:
        """What a read of so many bytes would take; None if nothing is known yet."""


class Operation(Enum):
    """What a job asks of the tier."""

    READ = "read"
    PROBE = "probe"
    WRITE = "write"
    DELETE = "delete"
    PROOF = "proof"


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What one tier's queue may hold, and what it puts up with."""

    num_threads: int = 4
    """Calls at once."""
    queue_bytes_max: int = 256 << 20
    """Values and rooms of all jobs that have not ended; one batch must fit."""
    queue_jobs_max: int = 256
    """Jobs that have not ended."""
    deadline_s: float = 5.0
    """A call that takes longer is overdue: the tier is left alone. A job that waits longer ends."""
    failures_max: int = 5
    """Failed calls in a row after which the tier is left alone."""
    pause_s: float = 2.0
    """How long it is, before one job tries it again."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_threads <= NUM_THREADS_MAX:
            raise InputError(f"num_threads must be 1 to {NUM_THREADS_MAX}, not {self.num_threads}")
        for name in ("queue_bytes_max", "queue_jobs_max", "failures_max", "deadline_s", "pause_s"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be more than 0, not {getattr(self, name)}")


@dataclass(eq=False, slots=True)
class _Job:
    operation: Operation
    call: Callable[[], Any]
    done: Callable[[Outcome[Any]], None]
    num_bytes: int
    ticket: int
    submitted_s: float
    begun_s: float | None = field(default=None)

    @property
    def is_urgent(self) -> bool:
        return self.operation in (Operation.READ, Operation.PROBE, Operation.PROOF)


@dataclass(frozen=True, slots=True)
class HangingCall:
    """A call that had not returned when the queue was closed; its memory is still in use."""

    operation: str
    num_bytes: int
    age_s: float


class TierQueue:
    """Threads and a bounded queue before one tier. Thread-safe."""

    def __init__(
        self, tier: Tier, limits: QueueLimits | None = None, clock: Clock | None = None
    ) -> None:
        self.tier = tier
        self.limits = limits or QueueLimits()
        self._clock = clock or SystemClock()
        self._breaker = Breaker(self.limits.failures_max, self.limits.pause_s)
        self._writes_max = max(1, self.limits.num_threads - 1)
        self._changed = threading.Condition()
        self._urgent: deque[_Job] = deque()
        self._patient: deque[_Job] = deque()
        self._running: dict[_Job, None] = {}
        self._num_jobs = self._num_bytes = self._num_urgent_bytes = 0
        self._num_ending = 0
        """Calls that have returned and whose ``done`` has not."""
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        for _ in range(self.limits.num_threads):
            self._start_thread()

    # ---- submitting

    def submit_read(
        self,
        keys: Sequence[BlockKey],
        into: Sequence[Parts],
        done: Callable[[Outcome[list[int | None]]], None],
    ) -> bool:
        """Have ``into`` filled as by ``Tier.read``; it belongs to the queue until ``done``.

        Returns:
            False if the job was refused: ``done`` is not called and the memory not touched.
        """
        num_bytes = sum(length_of(room) for room in into)
        return self._submit(Operation.READ, lambda: self.tier.read(keys, into), done, num_bytes)

    def submit_write(
        self,
        keys: Sequence[BlockKey],
        values: Sequence[Parts],
        done: Callable[[Outcome[list[bool]]], None],
    ) -> bool:
        """Have values written as by ``Tier.write``; nobody changes them until ``done``.

        Returns:
            False if the job was refused: ``done`` is not called.
        """
        num_bytes = sum(length_of(value) for value in values)
        return self._submit(Operation.WRITE, lambda: self.tier.write(keys, values), done, num_bytes)

    def submit_delete(
        self, keys: Sequence[BlockKey], done: Callable[[Outcome[None]], None]
    ) -> bool:
        """Have values forgotten as by ``Tier.delete``; False if the job was refused."""
        return self._submit(Operation.DELETE, lambda: self.tier.delete(keys), done, 0)

    def submit_probe(
        self, keys: Sequence[BlockKey], done: Callable[[Outcome[list[bool]]], None]
    ) -> bool:
        """Ask as by ``Probes.lookup``; False if the job was refused or the tier can't tell."""
        tier = self.tier
        if not isinstance(tier, Probes):
            return False
        return self._submit(Operation.PROBE, lambda: tier.lookup(keys), done, 0)

    def submit_proof(
        self, proof: Callable[[Tier], Answer], done: Callable[[Outcome[Answer]], None]
    ) -> bool:
        """Have several calls made on the tier as one job, in memory of their own; as a read goes.

        Args:
            proof: Raises nothing but ``UnavailableError``.
            done: Told how it ended.

        Returns:
            False if the job was refused: ``done`` is not called.
        """
        return self._submit(Operation.PROOF, lambda: proof(self.tier), done, 0)

    def _submit(
        self,
        operation: Operation,
        call: Callable[[], Answer],
        done: Callable[[Outcome[Answer]], None],
        num_bytes: int,
    ) -> bool:
        now_s = self._clock.now_s()
        with self._changed:
            self._give_up_overdue(now_s)
            is_full = (
                self._num_jobs >= self.limits.queue_jobs_max
                or self._num_bytes + num_bytes > self.limits.queue_bytes_max
            )
            if self._is_closed or is_full or self._num_overdue(now_s) >= self.limits.num_threads:
                return False
            ticket = self._breaker.begin(now_s)
            if ticket is None:
                return False
            job = _Job(operation, call, done, num_bytes, ticket, now_s)
            (self._urgent if job.is_urgent else self._patient).append(job)
            self._num_jobs += 1
            self._num_bytes += num_bytes
            self._num_urgent_bytes += num_bytes if job.is_urgent else 0
            self._changed.notify()
            return True

    # ---- threads

    def _start_thread(self) -> None:
        # A daemon thread: a call that hangs for ever must not keep the process alive.
        thread = threading.Thread(target=self._work, name=f"tier-{self.tier.name}", daemon=True)
        self._threads = [known for known in self._threads if known.is_alive()] + [thread]
        thread.start()

    def _work(self) -> None:
        is_over = False
        try:
            while (job := self._take()) is not None:
                self._run(job)
            is_over = True
        finally:
            if not is_over:
                # A defect of a tier ends this thread, with its story on stderr, not the queue.
                with self._changed:
                    self._start_thread()

    def _take(self) -> _Job | None:
        """Wait for a job and begin it; None once the queue is closed."""
        with self._changed:
            while not self._is_closed:
                job = self._choose()
                if job is not None:
                    job.begun_s = self._clock.now_s()
                    self._running[job] = None
                    return job
                self._changed.wait()
            return None

    def _choose(self) -> _Job | None:
        if self._urgent:
            return self._urgent.popleft()
        num_writes = sum(1 for job in self._running if not job.is_urgent)
        if self._patient and num_writes < self._writes_max:
            return self._patient.popleft()
        return None

    def _run(self, job: _Job) -> None:
        outcome: Outcome[Any] = Outcome(
            None, UnavailableError(f"the tier {self.tier.name} has a defect: see the log")
        )
        try:
            outcome = self._call(job)
        finally:
            stale = self._end(job, outcome)
            try:
                job.done(outcome)
                self._refuse(stale)
            finally:
                with self._changed:
                    self._num_ending -= 1
                    self._changed.notify_all()

    def _call(self, job: _Job) -> Outcome[Any]:
        try:
            return Outcome(job.call())
        except UnavailableError as error:
            return Outcome(None, error)

    def _end(self, job: _Job, outcome: Outcome[Any]) -> list[_Job]:
        """Count a job as ended; returns queued jobs that end with it, as the breaker opened."""
        with self._changed:
            if outcome.error is None:
                self._breaker.finish(job.ticket)
            else:
                self._breaker.fail(job.ticket, self._clock.now_s())
            del self._running[job]
            self._num_ending += 1
            self._release(job)
            self._changed.notify_all()
            return self._take_stale(self._clock.now_s())

    def _release(self, job: _Job) -> None:
        self._num_jobs -= 1
        self._num_bytes -= job.num_bytes
        self._num_urgent_bytes -= job.num_bytes if job.is_urgent else 0

    # ---- what is late

    def is_late(self, now_s: float) -> bool:
        """Whether a call is overdue: it began more than ``deadline_s`` ago and has not returned."""
        with self._changed:
            return self._num_overdue(now_s) > 0

    def oldest_age_s(self, now_s: float) -> float:
        """How long ago the oldest job was submitted that has not ended; 0 without jobs."""
        with self._changed:
            jobs = [*self._running, *self._urgent, *self._patient]
            return max((now_s - job.submitted_s for job in jobs), default=0.0)

    def sweep(self, now_s: float) -> None:
        """Leave the tier alone if a call is overdue, and end jobs that wait in vain.

        In vain: behind an open breaker, or for longer than ``deadline_s``.
        """
        with self._changed:
            self._give_up_overdue(now_s)
            stale = self._take_stale(now_s)
        self._refuse(stale)

    def _is_overdue(self, job: _Job, now_s: float) -> bool:
        return job.begun_s is not None and now_s - job.begun_s > self.limits.deadline_s

    def _num_overdue(self, now_s: float) -> int:
        return sum(1 for job in self._running if self._is_overdue(job, now_s))

    def _give_up_overdue(self, now_s: float) -> None:
        for job in self._running:
            if self._is_overdue(job, now_s):
                self._breaker.give_up(job.ticket, now_s)

    def _take_stale(self, now_s: float) -> list[_Job]:
        """Take the queued jobs that nothing is asked for any more."""
        stale: list[_Job] = []
        for lane in (self._urgent, self._patient):
            queued = list(lane)
            lane.clear()
            for job in queued:
                is_wanted = now_s - job.submitted_s <= self.limits.deadline_s
                is_current = self._breaker.is_current(job.ticket)
                (lane if is_wanted and is_current else stale).append(job)
        for job in stale:
            self._release(job)
            if self._breaker.state is BreakerState.HALF_OPEN:
                # If it was the trial, another has to be made; other tickets are stale here.
                self._breaker.give_up(job.ticket, now_s)
        return stale

    def _refuse(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            job.done(self._left_alone())

    def _left_alone(self) -> Outcome[Any]:
        return Outcome(
            None, UnavailableError(f"the tier {self.tier.name} failed and is left alone for now")
        )

    # ---- how full, how fast

    @property
    def queued_bytes(self) -> int:
        """Bytes of values and rooms of all jobs that have not ended."""
        return self._num_bytes

    @property
    def breaker_state(self) -> BreakerState:
        """Whether the tier is asked at all."""
        return self._breaker.state

    def estimate_s(self, num_bytes: int) -> float | None:
        """How long a read of so many bytes would take if it were submitted now.

        Returns:
            Seconds; infinite while the tier is left alone; None if its speed is not known (yet).
        """
        with self._changed:
            if not self._breaker.is_admitting(self._clock.now_s()):
                return float("inf")
            waiting_bytes = self._num_urgent_bytes // self.limits.num_threads
        if not isinstance(self.tier, Estimates):
            return None
        return self.tier.estimate_read_s(waiting_bytes + num_bytes)

    def close(self, timeout_s: float) -> list[HangingCall]:
        """Take no more jobs, end those that wait, and wait for the calls under way.

        The tier stays open: close it only if nothing hangs.

        Returns:
            Calls that have not returned after ``timeout_s``; their memory is still in use.
        """
        closed = UnavailableError(f"the queue of the tier {self.tier.name} is closed")
        with self._changed:
            self._is_closed = True
            waiting = [*self._urgent, *self._patient]
            self._urgent.clear()
            self._patient.clear()
            for job in waiting:
                self._release(job)
            self._changed.notify_all()
        for job in waiting:
            job.done(Outcome(None, closed))
        with self._changed:
            self._changed.wait_for(lambda: not self._running and not self._num_ending, timeout_s)
            now_s = self._clock.now_s()
            hanging = [
                HangingCall(job.operation.value, job.num_bytes, now_s - (job.begun_s or now_s))
                for job in self._running
            ]
        for thread in self._threads if not hanging else ():
            thread.join(timeout_s)
        return hanging
