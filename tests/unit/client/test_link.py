"""The thread that finds the daemon, with scripted connections."""

import threading
from typing import cast

import pytest

from kvkeep.client import link as module
from kvkeep.client.connection import Connection
from kvkeep.client.link import Link
from kvkeep.model.errors import RefusedError, UnavailableError
from kvkeep.protocol import messages as m

HELLO = m.Hello(1, "tool", "test")
LONG_S = 60.0


class Closing:
    """A connection of which only the end matters."""

    def __init__(self) -> None:
        self.is_closed = threading.Event()
        self.is_dropped = threading.Event()

    def is_hung_up(self, wait_s: float) -> bool:
        """Whether the test dropped it or somebody closed it."""
        return self.is_dropped.wait(max(wait_s, 0.01)) or self.is_closed.is_set()

    def close(self) -> None:
        """Take note."""
        self.is_closed.set()


class Opener:
    """Stands for ``Connection.open``: does what the script says, attempt by attempt."""

    def __init__(self) -> None:
        self.script: list[Closing | Exception] = []
        self.num_attempts = 0
        self.is_done = threading.Event()

    def __call__(self, *_: object, **__: object) -> Connection:
        """One attempt; after the script's end nobody is there."""
        self.num_attempts += 1
        step = self.script.pop(0) if self.script else UnavailableError("nobody")
        if not self.script:
            self.is_done.set()
        if isinstance(step, Exception):
            raise step
        return cast(Connection, step)


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> Opener:
    """In place of sockets."""
    made = Opener()
    monkeypatch.setattr(Connection, "open", made)
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    return made


def test_it_tries_until_somebody_answers(opener: Opener) -> None:
    """A daemon that starts later is found."""
    found = Closing()
    opener.script = [UnavailableError("nobody"), UnavailableError("nobody"), found]
    link = Link("path", lambda: HELLO)

    assert link.wait(LONG_S) is cast(Connection, found)
    assert opener.num_attempts == 3
    link.close()
    assert found.is_closed.is_set()


def test_a_refusal_ends_the_wait_and_is_told(opener: Opener) -> None:
    """Whoever waits at a start learns at once that waiting does not help."""
    opener.script = [RefusedError("another layout")]
    link = Link("path", lambda: HELLO)

    assert link.wait(LONG_S) is None
    assert link.refusal == "another layout"
    link.close()


def test_a_lost_connection_is_closed_and_replaced(opener: Opener) -> None:
    """Losing it twice, or losing an older one, changes nothing."""
    first, second = Closing(), Closing()
    opener.script = [first]
    link = Link("path", lambda: HELLO)
    assert link.wait(LONG_S) is cast(Connection, first)
    opener.script = [second]
    for _ in range(2):
        link.lost(cast(Connection, first), "test")

    assert first.is_closed.is_set()
    assert link.wait(LONG_S) is cast(Connection, second)
    link.lost(cast(Connection, first), "test")
    assert link.connection is cast(Connection, second)
    assert link.num_opened == 2
    link.close()


def test_a_hang_up_is_noticed_though_nobody_asks(opener: Opener) -> None:
    """An idle engine finds a restarted daemon as well."""
    first, second = Closing(), Closing()
    opener.script = [first]
    link = Link("path", lambda: HELLO)
    assert link.wait(LONG_S) is cast(Connection, first)
    opener.script = [second]
    first.is_dropped.set()

    assert first.is_closed.wait(LONG_S)
    assert link.wait(LONG_S) is cast(Connection, second)
    link.close()


def test_a_connection_whose_pool_is_not_usable_is_rejected(opener: Opener) -> None:
    """Nobody sees a connection before its pool is mapped."""
    bad, good = Closing(), Closing()
    opener.script = [bad, good]

    def opened(connection: Connection) -> None:
        if connection is cast(Connection, bad):
            raise UnavailableError("not mapped")

    link = Link("path", lambda: HELLO, opened)
    assert link.wait(LONG_S) is cast(Connection, good)
    assert bad.is_closed.is_set()
    link.close()


def test_a_connection_that_comes_after_the_end_is_closed(opener: Opener) -> None:
    """A greeting answered late leaves no session behind."""
    late, is_asked, may_answer = Closing(), threading.Event(), threading.Event()
    opener.script = [late]

    def opened(_: Connection) -> None:
        is_asked.set()
        may_answer.wait(LONG_S)

    link = Link("path", lambda: HELLO, opened)
    assert is_asked.wait(LONG_S)
    closing = threading.Thread(target=link.close)
    link._stopped.set()
    may_answer.set()
    closing.start()
    closing.join()

    assert late.is_closed.is_set()
    assert link.connection is None
