"""Which message may come when."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.protocol import messages as m
from kvkeep.protocol.session import TRANSITIONS, Session, SessionState

HELLO = m.Hello(1, "tool", "e")


def test_a_session_begins_with_hello() -> None:
    """After Hello a client may ask; before it, nothing but a Ping is answered."""
    session = Session()
    session.receive(m.Ping(1))
    session.receive(HELLO)
    session.receive(m.GetStatus(2))

    assert session.state is SessionState.OPEN


@pytest.mark.parametrize("message", [m.Clear(1), m.GetStatus(1), m.Release([1])])
def test_a_request_before_hello_closes_the_session(message: m.Message) -> None:
    """Whoever asks without a greeting is told so, and is not served any more."""
    session = Session()
    with pytest.raises(InputError, match=f"{type(message).__name__} is not expected in a new"):
        session.receive(message)

    assert session.state is SessionState.CLOSED
    with pytest.raises(InputError, match="closed session"):
        session.receive(HELLO)


def test_a_second_hello_closes_the_session() -> None:
    """A session's role and layout are said once."""
    session = Session()
    session.receive(HELLO)
    with pytest.raises(InputError, match="Hello is not expected in a open"):
        session.receive(HELLO)

    assert session.state is SessionState.CLOSED


def test_every_message_to_the_daemon_has_a_place() -> None:
    """There is no message that a client may send in no state at all."""
    legal = {kind for row in TRANSITIONS.values() for kind in row}

    assert legal == set(m.ToDaemon.__args__)


def test_no_message_leads_out_of_closed() -> None:
    """What is closed stays closed."""
    assert TRANSITIONS[SessionState.CLOSED] == {}
