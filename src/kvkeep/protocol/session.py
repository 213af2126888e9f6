"""The life of one connection, seen from the daemon, as a table."""

from enum import Enum

from kvkeep.model.errors import InputError
from kvkeep.protocol import messages as m


class SessionState(Enum):
    """Where a connection stands."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


_REQUESTS: tuple[type[m.Message], ...] = (
    m.Acquire,
    m.Release,
    m.Reserve,
    m.Commit,
    m.ReportCorrupt,
    m.Ping,
    m.GetStatus,
    m.Clear,
    m.ListKeys,
    m.VerifyTier,
    m.ClearTiers,
    m.Explain,
    m.Prefetch,
    m.ReportHandoff,
    m.KeepCartridge,
    m.DropCartridge,
)

TRANSITIONS: dict[SessionState, dict[type[m.Message], SessionState]] = {
    SessionState.NEW: {m.Hello: SessionState.OPEN, m.Ping: SessionState.NEW},
    SessionState.OPEN: dict.fromkeys(_REQUESTS, SessionState.OPEN),
    SessionState.CLOSED: {},
}
"""Messages that a client may send in each state."""


class Session:
    """Checks that messages come in a legal order."""

    def __init__(self) -> None:
        self.state = SessionState.NEW

    def receive(self, message: m.Message) -> None:
        """Make the move for one message.

        Raises:
            InputError: Not legal here; the session is closed.
        """
        after = TRANSITIONS[self.state].get(type(message))
        if after is None:
            state, self.state = self.state, SessionState.CLOSED
            raise InputError(f"{type(message).__name__} is not expected in a {state.value} session")
        self.state = after
