"""The store thread commits what its mover stored, counts what it declined, and lets ranks rest."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvkeep.connector.metadata import StoreJob
from kvkeep.connector.worker import stores
from kvkeep.connector.worker.stores import StoreThread
from kvkeep.model.clock import SystemClock
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import join_slots

NUM_BLOCKS = 4
JOB = StoreJob(1, bytes(32 * NUM_BLOCKS), tuple(range(NUM_BLOCKS)))


class Daemon:
    """Grants every block but the second, and remembers what is committed."""

    lease_s = staticmethod(float)
    next_request_id = staticmethod(lambda: 1)

    def __init__(self) -> None:
        self.commits: list[bytes] = []
        self.timeouts_s: list[float] = []

    def call(self, message: Any, _: Any, timeout_s: float) -> Any:
        """See Connection."""
        self.timeouts_s.append(timeout_s)
        if isinstance(message, m.Reserve):
            return m.Reserved(1, 7, join_slots([3, 0xFFFFFFFF, 5, 6]))
        self.commits.append(message.is_stored)
        return m.Committed(1, 0, is_fenced=False)


class Mover:
    """Declines the block in slot 5."""

    def store(self, _: Any, __: Any, slots: list[int], ___: Any) -> Any:
        """See BlockMover."""
        return np.array([slot != 5 for slot in slots])


def thread_of(
    mover: Any, daemon: Daemon, *, may_begin: bool = True, patience_s: float = 0.25
) -> StoreThread:
    """A rank's thread, whose daemon answers at once."""

    @contextmanager
    def copying(_: Any) -> Any:
        yield may_begin

    pool = SimpleNamespace(view=SimpleNamespace(is_whole=lambda: True), is_proven=True)
    attachment: Any = SimpleNamespace(
        link=SimpleNamespace(connection=daemon), pool=pool, copying=copying
    )
    memory: Any = SimpleNamespace(first_head=0, num_heads=1)
    return StoreThread(
        attachment, mover, memory, SystemClock(), lease_s=30.0, patience_s=patience_s
    )


def stored(
    mover: Any, *, may_begin: bool = True, daemon: Daemon | None = None, patience_s: float = 0.25
) -> tuple[list[bytes], int, list[int]]:
    """Commits, blocks declined and jobs reported after one job of four blocks."""
    daemon = daemon or Daemon()
    thread = thread_of(mover, daemon, may_begin=may_begin, patience_s=patience_s)
    thread.submit(JOB, bytes(32), None)
    thread.close()
    return daemon.commits, thread.num_declined, thread.poll()


def test_a_declined_block_is_not_committed(caplog: pytest.LogCaptureFixture) -> None:
    """Its neighbors are; it is counted, and the log says why."""
    assert stored(Mover()) == ([bytes([1, 0, 1])], 1, [1])
    assert "not finite" in caplog.text


def test_a_copy_that_may_not_begin_commits_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """What was not copied is not stored, and nobody declined it."""
    assert stored(Mover(), may_begin=False) == ([bytes([0, 0, 0])], 0, [1])
    assert caplog.text == ""


@pytest.mark.parametrize(("patience_s", "waited_s"), [(0.25, 1.0), (10.0, 10.0)])
def test_a_slow_daemon_gets_the_patience_that_was_asked_for(
    patience_s: float, waited_s: float
) -> None:
    """A second at least: nobody waits for a store, and what it gives up is computed elsewhere."""
    daemon = Daemon()

    stored(Mover(), daemon=daemon, patience_s=patience_s)

    assert daemon.timeouts_s == [waited_s, waited_s]


class HeldMover:
    """Stores when it is told to."""

    def __init__(self) -> None:
        self.is_told = threading.Event()

    def store(self, _: Any, __: Any, slots: list[int], ___: Any) -> Any:
        """See BlockMover."""
        assert self.is_told.wait(60)
        return np.ones(len(slots), dtype=np.bool_)


def test_a_rest_ends_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that rests learns of the end of its store as soon as one that asks again and again."""
    monkeypatch.setattr(stores, "REST_S", 60.0)
    mover = HeldMover()
    thread = thread_of(mover, Daemon())
    thread.submit(JOB, bytes(32), None)
    teller = threading.Thread(target=mover.is_told.set)
    teller.start()
    try:
        thread.rest()

        assert thread.poll() == [1]
    finally:
        teller.join()
        thread.close()


def test_a_rest_ends_without_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the daemon does, the engine goes on."""
    monkeypatch.setattr(stores, "REST_S", 0.001)
    mover = HeldMover()
    thread = thread_of(mover, Daemon())
    thread.submit(JOB, bytes(32), None)
    try:
        thread.rest()

        assert thread.poll() == []
    finally:
        mover.is_told.set()
        thread.close()


def test_a_job_that_was_named_does_not_end_the_next_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rest is no poll in disguise."""
    waited_s: list[float | None] = []
    thread = thread_of(Mover(), Daemon())
    thread.skip(JOB)
    assert thread.poll() == [1]
    monkeypatch.setattr(thread._has_news, "wait", waited_s.append)
    thread.rest()

    assert waited_s == [stores.REST_S]
    assert not thread._has_news.is_set()
    thread.close()
