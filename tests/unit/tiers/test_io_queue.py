"""A bounded front of a tier: back-pressure, order, and nothing abandoned."""

import queue
import threading
from collections.abc import Iterator, Sequence

import pytest

from kvkeep.core.breaker import BreakerState
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.testing.tier_contract import block_key, in_parts, value_bytes
from kvkeep.tiers.base import Parts
from kvkeep.tiers.io_queue import Outcome, QueueLimits, TierQueue
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers.metered import MeteredTier

WAIT_S = 60.0
"""For what happens at once unless it never does."""
LENGTH = 100


class StepClock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def now_s(self) -> float:
        return self.now


class GatedTier(MemoryTier):
    """Each call stops at a gate, says so, and goes on when it is let through."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.is_gated = False
        self.is_failing = False
        self.is_broken = False
        self.reached: queue.Queue[tuple[str, int]] = queue.Queue()
        self.gate = threading.Semaphore(0)
        self.threads: set[int] = set()

    def _pass(self, name: str, keys: Sequence[BlockKey]) -> None:
        self.threads.add(threading.get_ident())
        if self.is_gated:
            self.reached.put((name, int.from_bytes(keys[0].block_hash)))
            self.gate.acquire()
        if self.is_broken:
            raise ZeroDivisionError("a defect")
        if self.is_failing:
            raise UnavailableError("gone")

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        self._pass("read", keys)
        return super().read(keys, into)

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        self._pass("write", keys)
        return super().write(keys, values)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        self._pass("delete", keys)
        super().delete(keys)


class Done:
    """Collects outcomes, and the threads that brought them."""

    def __init__(self) -> None:
        self.outcomes: queue.Queue[Outcome[object]] = queue.Queue()
        self.threads: list[int] = []

    def __call__(self, outcome: Outcome[object]) -> None:
        self.threads.append(threading.get_ident())
        self.outcomes.put(outcome)

    def next(self) -> Outcome[object]:
        return self.outcomes.get(timeout=WAIT_S)


class Bench:
    """A queue on a gated tier."""

    def __init__(self, limits: QueueLimits) -> None:
        self.clock = StepClock()
        self.tier = GatedTier()
        self.queue = TierQueue(self.tier, limits, self.clock)
        self.done = Done()

    def read(self, number: int, length: int = LENGTH) -> bool:
        return self.queue.submit_read([block_key(number)], [in_parts(bytearray(length))], self.done)

    def write(self, number: int, length: int = LENGTH) -> bool:
        value = in_parts(value_bytes(number, length))
        return self.queue.submit_write([block_key(number)], [value], self.done)

    def reached(self) -> tuple[str, int]:
        return self.tier.reached.get(timeout=WAIT_S)

    def state(self) -> BreakerState:
        return self.queue.breaker_state

    def sweep(self) -> None:
        self.queue.sweep(self.clock.now)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """By default one thread, four jobs, 1,000 bytes, 5 s, two failures, a pause of 2 s."""
    settings = {
        "num_threads": 1,
        "queue_jobs_max": 4,
        "queue_bytes_max": 1000,
        "deadline_s": 5.0,
        "failures_max": 2,
        "pause_s": 2.0,
    }
    made = Bench(QueueLimits(**{**settings, **getattr(request, "param", {})}))
    yield made
    made.tier.is_gated = False
    made.tier.gate.release(100)
    assert made.queue.close(WAIT_S) == []


def test_jobs_are_done_on_threads_of_the_queue(bench: Bench) -> None:
    """Each brings its answer, and room that is filled."""
    room = bytearray(LENGTH)
    assert bench.write(1)
    assert bench.done.next() == Outcome([True])
    assert bench.queue.submit_read([block_key(1)], [in_parts(room)], bench.done)
    assert bench.done.next() == Outcome([LENGTH])
    assert bench.queue.submit_probe([block_key(1)], bench.done)
    assert bench.done.next() == Outcome([True])
    assert bench.queue.submit_delete([block_key(1)], bench.done)
    assert bench.done.next() == Outcome(None)

    assert room == value_bytes(1, LENGTH)
    assert bench.tier.lookup([block_key(1)]) == [False]
    assert threading.get_ident() not in bench.done.threads
    assert set(bench.done.threads) == bench.tier.threads


def test_a_full_queue_refuses_at_once(bench: Bench) -> None:
    """By jobs and by bytes, those under way included; refused means never called."""
    bench.tier.is_gated = True
    assert [bench.read(number) for number in range(5)] == [True] * 4 + [False]
    bench.tier.gate.release(4)
    for _ in range(4):
        bench.done.next()

    bench.reached()
    assert [bench.read(1, length) for length in (600, 600, 400)] == [True, False, True]
    assert bench.queue.queued_bytes == 1000
    bench.tier.gate.release(2)
    assert [bench.done.next().answer for _ in range(2)] == [[None], [None]]
    assert bench.queue.queued_bytes == 0
    assert bench.done.outcomes.empty()


def test_reads_go_before_writes(bench: Bench) -> None:
    """A load is never behind stores that were submitted before it."""
    bench.tier.is_gated = True
    bench.write(1)
    assert bench.reached() == ("write", 1)
    bench.write(2)
    bench.read(3)
    bench.tier.gate.release(3)

    assert [bench.reached() for _ in range(2)] == [("read", 3), ("write", 2)]


@pytest.mark.parametrize("bench", [{"num_threads": 2}], indirect=True)
def test_a_thread_is_kept_for_reads(bench: Bench) -> None:
    """However many writes there are, they leave one thread alone, and a read begins at once."""
    bench.tier.is_gated = True
    bench.write(1)
    bench.write(2)
    assert bench.reached() == ("write", 1)
    with pytest.raises(queue.Empty):
        bench.tier.reached.get(timeout=0.2)
    bench.read(3)

    assert bench.reached() == ("read", 3)


def test_a_failure_is_an_outcome(bench: Bench) -> None:
    """The medium's error comes to whoever submitted."""
    bench.tier.is_failing = True
    bench.read(1)
    outcome = bench.done.next()

    assert outcome.answer is None
    assert str(outcome.error) == "gone"


def test_after_failures_the_tier_is_left_alone_and_tried_again(bench: Bench) -> None:
    """Refused during the pause; one job tries; when it goes well all is as before."""
    bench.tier.is_failing = True
    for number in range(2):
        bench.read(number)
        bench.done.next()
    assert bench.state() is BreakerState.OPEN
    assert not bench.read(3)
    assert bench.queue.estimate_s(1) == float("inf")

    bench.tier.is_failing = False
    bench.tier.is_gated = True
    bench.clock.now += 2.0
    assert [bench.read(4), bench.read(5)] == [True, False]
    bench.tier.gate.release()
    bench.done.next()

    assert bench.state() is BreakerState.CLOSED
    assert bench.queue.submit_probe([block_key(1)], bench.done)


def test_queued_jobs_end_when_the_breaker_opens(bench: Bench) -> None:
    """A dead server does not cost each of them its time limit: the tier is not asked."""
    bench.tier.is_gated = bench.tier.is_failing = True
    for number in range(4):
        bench.read(number)
    bench.tier.gate.release(2)
    errors = [str(bench.done.next().error) for _ in range(4)]

    assert errors[:2] == ["gone"] * 2
    assert errors[2:] == ["the tier memory failed and is left alone for now"] * 2
    assert bench.tier.reached.qsize() == 2
    assert bench.queue.queued_bytes == 0


def test_a_call_that_hangs_is_noticed_and_not_abandoned(bench: Bench) -> None:
    """Its queue is given up and nothing more is taken, but it ends when it really ends."""
    bench.tier.is_gated = True
    bench.read(1)
    bench.reached()
    bench.write(2)
    bench.clock.now += 5.0
    bench.sweep()
    assert not bench.queue.is_late(bench.clock.now)
    assert bench.done.outcomes.empty()

    bench.clock.now += 0.1
    assert bench.queue.is_late(bench.clock.now)
    assert bench.queue.oldest_age_s(bench.clock.now) == pytest.approx(5.1)
    bench.sweep()
    assert bench.done.next().error is not None
    bench.clock.now += 10.0
    assert not bench.read(3)
    assert bench.done.outcomes.empty()

    bench.tier.gate.release()
    assert bench.done.next() == Outcome([None])
    bench.tier.gate.release()
    assert bench.read(4)
    assert bench.done.next() == Outcome([None])
    assert bench.state() is BreakerState.CLOSED


@pytest.mark.parametrize("bench", [{"num_threads": 2}], indirect=True)
def test_a_trial_that_finds_no_thread_ends(bench: Bench) -> None:
    """A job that waits longer than a call may take ends with an error, also a trial."""
    bench.tier.is_gated = True
    bench.write(1)
    bench.reached()
    bench.clock.now += 6.0
    bench.sweep()
    bench.clock.now += 2.0
    assert bench.write(2)
    assert bench.state() is BreakerState.HALF_OPEN
    bench.clock.now += 6.0
    bench.sweep()

    assert bench.done.next().error is not None
    assert bench.state() is BreakerState.OPEN


def test_a_defect_of_the_tier_ends_the_job_not_the_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread tells its story and another takes its place."""
    stories: queue.Queue[type[BaseException]] = queue.Queue()
    monkeypatch.setattr(threading, "excepthook", lambda args: stories.put(args.exc_type))
    bench.tier.is_broken = True
    bench.read(1)
    assert "has a defect" in str(bench.done.next().error)
    assert stories.get(timeout=WAIT_S) is ZeroDivisionError

    bench.tier.is_broken = False
    assert bench.read(1)
    assert bench.done.next() == Outcome([None])


def test_closing_ends_what_waits_and_names_what_hangs(bench: Bench) -> None:
    """No job is without an outcome but those whose call has not returned."""
    bench.tier.is_gated = True
    bench.read(1)
    bench.reached()
    bench.write(2)
    bench.clock.now += 1.5

    (hanging,) = bench.queue.close(0.01)
    assert (hanging.operation, hanging.num_bytes, hanging.age_s) == ("read", LENGTH, 1.5)
    assert "is closed" in str(bench.done.next().error)
    assert not bench.read(3)
    bench.tier.gate.release()
    assert bench.done.next() == Outcome([None])


def test_it_estimates_from_what_was_measured_and_what_waits() -> None:
    """The reads before it count, writes do not; without a meter nothing is known."""
    clock = StepClock()
    inner = GatedTier()
    bare, metered = TierQueue(inner, clock=clock), TierQueue(MeteredTier(inner, clock), clock=clock)
    done = Done()
    inner.is_gated = True
    value = value_bytes(1, 1000)
    metered.submit_write([block_key(1)], [in_parts(value)], done)
    inner.gate.release()
    done.next()
    assert metered.estimate_s(1000) is None
    metered.submit_read([block_key(1)], [in_parts(bytearray(1000))], done)
    while inner.reached.get(timeout=WAIT_S)[0] != "read":
        pass
    clock.now += 2.0
    inner.gate.release()
    done.next()

    assert metered.estimate_s(1000) == pytest.approx(2.0)
    metered.submit_read([block_key(1)], [in_parts(bytearray(4000))], done)
    inner.reached.get(timeout=WAIT_S)
    assert metered.estimate_s(1000) == pytest.approx(4.0)
    assert bare.estimate_s(1000) is None
    inner.gate.release()
    assert bare.close(WAIT_S) == metered.close(WAIT_S) == []


@pytest.mark.parametrize(
    "setting",
    [{"num_threads": 0}, {"num_threads": 65}, {"queue_jobs_max": 0}, {"deadline_s": 0.0}],
)
def test_limits_are_checked_at_birth(setting: dict[str, int]) -> None:
    """A limit out of range is refused."""
    with pytest.raises(InputError):
        QueueLimits(**setting)
