"""What the faults of a daemon must not cost: time of the thread that computes."""

import threading
from typing import Any

import pytest

from kvkeep.client.connection import Connection


@pytest.fixture
def waits_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the test's thread, as an engine's, was ready to wait for a daemon, each time.

    Not how long it took: on a busy machine that says nothing of the code.
    """
    found: list[float] = []
    engine_thread = threading.current_thread()
    receive = Connection.receive

    def watched(self: Connection, wait_s: float) -> Any:
        if threading.current_thread() is engine_thread:
            found.append(wait_s)
        return receive(self, wait_s)

    monkeypatch.setattr(Connection, "receive", watched)
    return found
