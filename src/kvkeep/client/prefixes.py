"""Leases on prefixes, for a scheduler thread that must never wait.

A question is sent when a request arrives (``ask``) and its answer picked up when the request is
scheduled (``answer``), each without blocking beyond the few milliseconds that the caller allows. A
daemon that does not answer in time is given up at once and everything is a miss until it is back.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from kvkeep.client.connection import Connection
from kvkeep.client.link import Link
from kvkeep.model.clock import Clock
from kvkeep.model.errors import RefusedError, UnavailableError
from kvkeep.model.ids import BlockHash, Namespace
from kvkeep.protocol import codec
from kvkeep.protocol import messages as m

log = logging.getLogger(__name__)

QUESTIONS_MAX = 4096
"""Open questions at once; far above any scheduler's waiting queue that is still served."""


@dataclass(frozen=True, slots=True)
class PrefixLease:
    """The leading blocks of a sequence, readable until ``deadline_s``."""

    lease_id: int
    slots: tuple[int, ...]
    """One pool slot per block, in the order of the sequence."""
    deadline_s: float
    """Monotonic; the daemon's own deadline is a little later: it counts from its receipt."""
    connection: Connection
    """The session that holds it; over when that is."""
    generation: int = 0
    """Of the daemon that granted it."""
    lease_s: float = 0.0
    """How long it was granted for, in seconds."""


class Answer(Enum):
    """What a question can be answered with besides a lease."""

    NOTHING = "nothing"
    PENDING = "pending"


@dataclass(frozen=True, slots=True)
class Question:
    """An Acquire on its way."""

    request_id: int
    asked_s: float
    connection: Connection
    lease_s: float
    """Seconds that were asked for."""


class PrefixClient:
    """One scheduler's questions and leases. Used by one thread."""

    def __init__(self, link: Link, clock: Clock, *, lease_s: float, patience_s: float) -> None:
        """Make a client.

        Args:
            link: Its connection is this client's alone.
            clock: Monotonic.
            lease_s: How long a lease is asked for; less where the daemon grants less.
            patience_s: After this long without an answer the daemon counts as lost.
        """
        self._link = link
        self._clock = clock
        self._lease_s = lease_s
        self._patience_s = patience_s
        self._answers: dict[int, m.Acquired | None] = {}
        """By request id: None while open."""
        self._coming_s: dict[int, float] = {}
        """By request id: until when the second answer comes, where the first announced one."""
        self._connection: Connection | None = None
        self.num_late = 0
        self.num_prefetching = 0
        """Blocks that daemons set out to bring for prefetches, as far as they have answered."""

    @property
    def is_connected(self) -> bool:
        """Whether there is a daemon to ask."""
        return self._link.connection is not None

    def _current(self) -> Connection | None:
        connection = self._link.connection
        if connection is not self._connection:
            self._connection = connection
            self._forget_all()
        return connection

    def _lose(self, connection: Connection, reason: object) -> None:
        self._link.lost(connection, reason)
        self._forget_all()

    def _forget_all(self) -> None:
        self._answers.clear()
        self._coming_s.clear()

    def ask(
        self,
        namespace: Namespace,
        group_idx: int,
        hashes: Sequence[BlockHash],
        prefill_tokens_s: int = 0,
        engine_request: str | None = None,
    ) -> Question | None:
        """Ask for a lease on the longest readable prefix.

        Args:
            namespace: Of all the blocks.
            group_idx: Of all the blocks.
            hashes: In the order of the sequence.
            prefill_tokens_s: Tokens a second that this engine computes; 0 if it does not know.
            engine_request: What the engine calls the request; any text.

        Returns:
            The question; None if nobody can be asked.
        """
        connection = self._current()
        if connection is None or len(self._answers) >= QUESTIONS_MAX:
            return None
        request_id = connection.next_request_id()
        joined = codec.join_hashes(hashes[: m.HASHES_MAX])
        lease_s = connection.lease_s(self._lease_s)
        try:
            connection.send(
                m.Acquire(
                    request_id,
                    namespace,
                    group_idx,
                    joined,
                    lease_s,
                    prefill_tokens_s,
                    _sendable(engine_request),
                )
            )
        except UnavailableError as error:
            self._lose(connection, error)
            return None
        self._answers[request_id] = None
        return Question(request_id, self._clock.now_s(), connection, lease_s)

    def prefetch(
        self,
        namespace: Namespace,
        group_idx: int,
        hashes: Sequence[BlockHash],
        prefill_tokens_s: int = 0,
    ) -> bool:
        """Ask for blocks of a prefix to be brought to the pool before a request needs them.

        It waits for nothing, and nothing is lent: whoever needs them asks as always.

        Args:
            namespace: Of all the blocks.
            group_idx: Of all the blocks.
            hashes: In the order of the sequence.
            prefill_tokens_s: Tokens a second that the engine computes which will need them; 0 if
                that is not known.

        Returns:
            Whether there was a daemon to ask.
        """
        connection = self._current()
        if connection is None:
            return False
        joined = codec.join_hashes(hashes[: m.HASHES_MAX])
        request_id = connection.next_request_id()
        self._send(m.Prefetch(request_id, namespace, group_idx, joined, prefill_tokens_s))
        # Answers are taken in also where nobody ever asks for a lease.
        return self._current() is connection and self._receive(connection, 0.0)

    def answer(
        self, question: Question, wait_s: float
    ) -> PrefixLease | Literal[Answer.NOTHING, Answer.PENDING]:
        """Pick up the answer to a question.

        Args:
            question: From ``ask``, not answered before.
            wait_s: How long this call may wait.

        Returns:
            The lease; ``NOTHING`` if there is nothing to read or nobody answers; ``PENDING`` if
            the answer is still to come.
        """
        connection = self._current()
        if connection is None or question.connection is not connection:
            return Answer.NOTHING
        deadline_s = self._clock.now_s() + wait_s
        while (answer := self._answers.get(question.request_id)) is None:
            if not self._receive(connection, deadline_s - self._clock.now_s()):
                return Answer.NOTHING
            now_s = self._clock.now_s()
            if self._answers.get(question.request_id) is None and now_s >= deadline_s:
                if now_s < self._late_s(question):
                    return Answer.PENDING
                self.num_late += 1
                self._lose(connection, f"no answer within {self._patience_s} s")
                return Answer.NOTHING
        self._drop(question.request_id)
        if not answer.lease_id:
            return Answer.NOTHING
        slots = codec.split_slots(answer.slots)
        # The daemon counts from its grant, which is later.
        deadline_s = question.asked_s + question.lease_s
        return PrefixLease(
            answer.lease_id, slots, deadline_s, connection, answer.generation, question.lease_s
        )

    def _late_s(self, question: Question) -> float:
        """When the daemon counts as lost: blocks on their way are waited for as long as it said."""
        begun_s = self._coming_s.get(question.request_id, question.asked_s)
        return begun_s + self._patience_s

    def _receive(self, connection: Connection, wait_s: float) -> bool:
        """Take in what has arrived; False if the connection was lost."""
        try:
            messages = connection.receive(wait_s)
        except (UnavailableError, RefusedError) as error:
            self._lose(connection, error)
            return False
        for message in messages:
            if isinstance(message, m.Acquired):
                self._take(message)
            elif isinstance(message, m.Prefetching):
                self.num_prefetching += message.num_accepted
        return True

    def _take(self, message: m.Acquired) -> None:
        if message.request_id not in self._answers:
            if message.lease_id:
                # The asker has gone meanwhile.
                self._send(m.Release([message.lease_id]))
        elif message.wait_us:
            self._coming_s[message.request_id] = self._clock.now_s() + message.wait_us / 1e6
        else:
            self._answers[message.request_id] = message

    def _drop(self, request_id: int) -> m.Acquired | None:
        self._coming_s.pop(request_id, None)
        return self._answers.pop(request_id, None)

    def forget(self, question: Question) -> None:
        """Nobody will pick up this answer: give its lease back when it comes."""
        answer = self._drop(question.request_id)
        if answer is not None and answer.lease_id and question.connection is self._connection:
            self._send(m.Release([answer.lease_id]))

    def release(
        self,
        leases: Sequence[PrefixLease],
        *,
        num_loaded: int = 0,
        num_failed: int = 0,
        load_us: int = 0,
        num_declined: int = 0,
    ) -> None:
        """Give leases back and report what was loaded; those of a lost session are over anyway."""
        connection = self._current()
        lease_ids = [lease.lease_id for lease in leases if lease.connection is connection]
        if connection is not None and (lease_ids or num_loaded or num_failed):
            self._send(m.Release(lease_ids, num_loaded, num_failed, load_us, num_declined))

    def report_corrupt(
        self, namespace: Namespace, group_idx: int, hashes: Sequence[BlockHash]
    ) -> None:
        """Tell the daemon never to lend these blocks again."""
        self._send(m.ReportCorrupt(namespace, group_idx, codec.join_hashes(hashes)))

    def report_handoff(self, outcome: m.HandoffOutcome, num_missed: int, wait_us: int) -> None:
        """Tell the daemon how a handoff to or from this engine went."""
        self._send(m.ReportHandoff(outcome, num_missed, wait_us))

    @property
    def session(self) -> object:
        """What changes when the daemon has to be told everything anew; None without one."""
        return self._current()

    def keep_cartridge(
        self,
        cartridge_id: str,
        digest: str,
        namespace: Namespace,
        hashes: Sequence[BlockHash],
        *,
        is_pinned: bool,
    ) -> None:
        """Tell the daemon that these are a cartridge's blocks, and whether they are to stay."""
        joined = codec.join_hashes(hashes[: m.HASHES_MAX])
        self._send(m.KeepCartridge(cartridge_id, digest, namespace, 0, joined, is_pinned))

    def _send(self, message: m.Message) -> None:
        connection = self._current()
        if connection is None:
            return
        try:
            connection.send(message)
        except UnavailableError as error:
            self._lose(connection, error)

    def close(self) -> None:
        """End the session."""
        self._link.close()


def _sendable(name: str | None) -> str | None:
    """A name that a user of the engine may have chosen, as far as it fits a message."""
    if name is None:
        return None
    return name[: m.NAME_MAX].encode(errors="replace").decode()
