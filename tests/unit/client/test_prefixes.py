"""The scheduler's questions, with scripted time and a scripted daemon."""

from collections import deque
from typing import cast

import pytest

from kvkeep.client.connection import Connection
from kvkeep.client.link import Link
from kvkeep.client.prefixes import QUESTIONS_MAX, Answer, PrefixClient, PrefixLease
from kvkeep.model.errors import UnavailableError
from kvkeep.model.ids import BlockHash, Namespace
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import join_slots

NAMESPACE = Namespace(b"n" * 32)
HASHES = [BlockHash(bytes([number]) * 32) for number in range(3)]
PATIENCE_S = 0.25


class ScriptedClock:
    """Time that passes when a test, or a wait, says so."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def now_s(self) -> float:
        """The time."""
        return self.time_s


class ScriptedConnection:
    """A daemon that answers what a test has put down."""

    def __init__(self, clock: ScriptedClock) -> None:
        self.clock = clock
        self.sent: list[m.Message] = []
        self.answers: deque[m.ToClient] = deque()
        self.is_broken = False
        self.longest_wait_s = 0.0

    def lease_s(self, wanted_s: float) -> float:
        """As long as is wanted."""
        return wanted_s

    def next_request_id(self) -> int:
        """The next number."""
        return len(self.sent) + 1

    def send(self, message: m.Message) -> None:
        """Take note."""
        if self.is_broken:
            raise UnavailableError("gone")
        self.sent.append(message)

    def receive(self, wait_s: float) -> list[m.ToClient]:
        """What is there; else time passes."""
        if self.is_broken:
            raise UnavailableError("gone")
        self.longest_wait_s = max(self.longest_wait_s, wait_s)
        if not self.answers:
            self.clock.time_s += max(wait_s, 0.0)
        found = list(self.answers)
        self.answers.clear()
        return found

    def close(self) -> None:
        """Nothing to close."""


class ScriptedLink:
    """A link that a test connects and that a client may lose."""

    def __init__(self, connection: ScriptedConnection) -> None:
        self.connection: ScriptedConnection | None = connection
        self.reasons: list[str] = []

    def lost(self, connection: ScriptedConnection, reason: object) -> None:
        """Take note."""
        assert connection is self.connection
        self.connection = None
        self.reasons.append(str(reason))


class Stage:
    """A client and everything it talks to."""

    def __init__(self) -> None:
        self.clock = ScriptedClock()
        self.daemon = ScriptedConnection(self.clock)
        self.link = ScriptedLink(self.daemon)
        self.client = PrefixClient(
            cast(Link, self.link), self.clock, lease_s=30.0, patience_s=PATIENCE_S
        )

    def announce(self, request_id: int, wait_s: float) -> None:
        """Say that blocks are on their way."""
        self.daemon.answers.append(m.Acquired(request_id, 0, b"", 1, int(wait_s * 1e6)))

    def grant(self, request_id: int, lease_id: int = 5, num_slots: int = 2) -> None:
        """Answer a question."""
        slots = join_slots(range(num_slots))
        self.daemon.answers.append(m.Acquired(request_id, lease_id, slots, 1))


@pytest.fixture
def stage() -> Stage:
    """A connected client."""
    return Stage()


def test_a_lease_counts_from_the_question(stage: Stage) -> None:
    """Its deadline is never later than the daemon's own."""
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    stage.clock.time_s += 0.001
    stage.grant(question.request_id)

    lease = stage.client.answer(question, 0.002)
    daemon = cast(Connection, stage.daemon)
    expected = PrefixLease(5, (0, 1), 130.0, daemon, generation=1, lease_s=30.0)
    assert lease == expected


def test_an_answer_may_be_picked_up_later(stage: Stage) -> None:
    """While it is on its way the caller goes on; no call waits longer than it may."""
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    assert stage.client.answer(question, 0.0) is Answer.PENDING
    assert stage.client.answer(question, 0.002) is Answer.PENDING
    assert stage.daemon.longest_wait_s <= 0.002
    stage.grant(question.request_id)

    assert isinstance(stage.client.answer(question, 0.0), PrefixLease)


def test_answers_come_in_any_order(stage: Stage) -> None:
    """An answer to another question is kept for whoever asked it."""
    first = stage.client.ask(NAMESPACE, 0, HASHES)
    second = stage.client.ask(NAMESPACE, 0, HASHES[:1])
    assert first is not None
    assert second is not None
    stage.grant(second.request_id, 8, 1)
    stage.grant(first.request_id, 7)

    answers = [stage.client.answer(first, 0.0), stage.client.answer(second, 0.0)]
    assert [answer.lease_id for answer in answers if isinstance(answer, PrefixLease)] == [7, 8]


def test_nothing_to_read_is_no_lease(stage: Stage) -> None:
    """The daemon is there and has none of the blocks."""
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    stage.grant(question.request_id, 0, 0)

    assert stage.client.answer(question, 0.0) is Answer.NOTHING
    assert stage.client.is_connected


def test_a_daemon_out_of_patience_is_lost(stage: Stage) -> None:
    """After that every question is a miss at once, and nothing is sent."""
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    stage.clock.time_s += PATIENCE_S

    assert stage.client.answer(question, 0.002) is Answer.NOTHING
    assert stage.client.num_late == 1
    assert stage.client.ask(NAMESPACE, 0, HASHES) is None


def test_an_old_sessions_question_and_lease_are_void(stage: Stage) -> None:
    """A daemon that came back knows nothing of them, whatever numbers it uses."""
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    kept = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    assert kept is not None
    stage.grant(kept.request_id)
    lease = stage.client.answer(kept, 0.0)
    assert isinstance(lease, PrefixLease)
    stage.link.connection = again = ScriptedConnection(stage.clock)
    again.answers.append(m.Acquired(question.request_id, 9, join_slots([1]), 2))

    assert stage.client.answer(question, 0.0) is Answer.NOTHING
    stage.client.release([lease])
    assert again.sent == []


def test_a_forgotten_questions_lease_is_given_back(stage: Stage) -> None:
    """Whether its answer has come already or comes later."""
    early = stage.client.ask(NAMESPACE, 0, HASHES)
    late = stage.client.ask(NAMESPACE, 0, HASHES)
    other = stage.client.ask(NAMESPACE, 0, HASHES)
    assert early is not None
    assert late is not None
    assert other is not None
    stage.grant(early.request_id, 11)
    assert stage.client.answer(other, 0.0) is Answer.PENDING
    stage.client.forget(early)
    stage.client.forget(late)
    stage.grant(late.request_id, 12)
    assert stage.client.answer(other, 0.0) is Answer.PENDING

    assert stage.daemon.sent[3:] == [m.Release([11]), m.Release([12])]


def test_a_release_reports_what_was_loaded(stage: Stage) -> None:
    """Even without a lease there may be something to report; with nothing, nothing is sent."""
    stage.client.release([])
    stage.client.release([], num_failed=2)

    assert stage.daemon.sent == [m.Release([], 0, 2, 0)]


def test_a_handoffs_outcome_is_reported(stage: Stage) -> None:
    """As it was told, and without an answer."""
    stage.client.report_handoff("partial", 2, 1000)

    assert stage.daemon.sent == [m.ReportHandoff("partial", 2, 1000)]


def test_a_broken_connection_is_lost_by_whichever_call_notices(stage: Stage) -> None:
    """No call raises: a cache failure is a miss."""
    stage.daemon.is_broken = True
    stage.client.report_corrupt(NAMESPACE, 0, HASHES)

    assert stage.link.reasons == ["gone"]
    assert not stage.client.is_connected


def test_open_questions_have_a_limit(stage: Stage) -> None:
    """A scheduler that never picks up answers does not fill its memory."""
    asked = [stage.client.ask(NAMESPACE, 0, []) for _ in range(QUESTIONS_MAX + 1)]

    assert asked[-2] is not None
    assert asked[-1] is None


def test_an_announced_answer_is_waited_for_as_long_as_was_said(stage: Stage) -> None:
    """The daemon is not lost meanwhile, and no call waits longer than it may."""
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    stage.announce(question.request_id, 5.0)
    assert stage.client.answer(question, 0.002) is Answer.PENDING
    stage.clock.time_s += 5.0
    assert stage.client.answer(question, 0.002) is Answer.PENDING
    stage.grant(question.request_id)

    lease = stage.client.answer(question, 0.0)
    assert isinstance(lease, PrefixLease)
    assert lease.deadline_s == question.asked_s + 30.0
    assert stage.client.num_late == 0


def test_a_longer_wait_may_be_announced_later(stage: Stage) -> None:
    """What was said last counts, from when it was heard."""
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    stage.announce(question.request_id, 0.25)
    assert stage.client.answer(question, 0.0) is Answer.PENDING
    stage.announce(question.request_id, 3.0)
    assert stage.client.answer(question, 0.0) is Answer.PENDING
    stage.clock.time_s += 3.0

    assert stage.client.answer(question, 0.0) is Answer.PENDING


def test_a_daemon_that_breaks_its_word_is_lost(stage: Stage) -> None:
    """After the announced time and the patience."""
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    stage.announce(question.request_id, 1.0)
    assert stage.client.answer(question, 0.0) is Answer.PENDING
    stage.clock.time_s += 1.0 + PATIENCE_S

    assert stage.client.answer(question, 0.0) is Answer.NOTHING
    assert stage.client.num_late == 1
    assert not stage.client.is_connected


def test_an_announcement_speaks_for_its_question_alone(stage: Stage) -> None:
    """Another question is late at its own time."""
    slow = stage.client.ask(NAMESPACE, 0, HASHES)
    other = stage.client.ask(NAMESPACE, 0, HASHES)
    assert slow is not None
    assert other is not None
    stage.announce(slow.request_id, 60.0)
    assert stage.client.answer(slow, 0.0) is Answer.PENDING
    stage.clock.time_s += PATIENCE_S

    assert stage.client.answer(other, 0.0) is Answer.NOTHING
    assert stage.client.num_late == 1


def test_an_announced_question_may_be_forgotten(stage: Stage) -> None:
    """Its lease is given back when it comes; nothing of it is remembered."""
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    other = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    assert other is not None
    stage.announce(question.request_id, 5.0)
    assert stage.client.answer(question, 0.0) is Answer.PENDING
    stage.client.forget(question)
    stage.announce(question.request_id, 5.0)
    stage.grant(question.request_id, 21)
    assert stage.client.answer(other, 0.0) is Answer.PENDING

    assert stage.daemon.sent[2:] == [m.Release([21])]
    assert stage.client._coming_s == {}


def test_a_prefetch_waits_for_nothing(stage: Stage) -> None:
    """What the daemon says to it is taken in when it comes, and changes no question."""
    assert stage.client.prefetch(NAMESPACE, 0, HASHES, 500)
    assert stage.daemon.sent == [m.Prefetch(1, NAMESPACE, 0, b"".join(HASHES), 500)]
    stage.daemon.answers.append(m.Prefetching(1, 3))
    question = stage.client.ask(NAMESPACE, 0, HASHES)
    assert question is not None
    stage.grant(question.request_id)

    assert isinstance(stage.client.answer(question, 1.0), PrefixLease)
    assert stage.client.num_prefetching == 3


def test_a_prefetch_without_a_daemon_is_not_asked(stage: Stage) -> None:
    """Neither where there is none nor where it is just gone."""
    stage.daemon.is_broken = True

    assert not stage.client.prefetch(NAMESPACE, 0, HASHES)
    assert stage.link.connection is None
    assert not stage.client.prefetch(NAMESPACE, 0, HASHES)
