"""The fleet as its sources want it: who joins, who leaves, and who is let go when. Pure.

A source says all it wants at once, as often as it likes; saying the same again changes nothing. An
endpoint is there while any source names it. One that none names any more is asked no more, and goes
when its last request has ended or ``drain_s`` have passed; named again before, it stays.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

from kvkeep.model.errors import InputError, RefusedError
from kvkeep.router.health.book import HealthBook
from kvkeep.router.membership.member import MEMBERS_MAX, Member
from kvkeep.router.snapshot import Endpoint, Fleet

log = logging.getLogger(__name__)

STATIC, FILE, API, ETCD = "static", "file", "api", "etcd"
SOURCES = (STATIC, FILE, API, ETCD)
"""In the order in which they win where two name one endpoint differently."""


class Listener(Protocol):
    """Who has to know of endpoints that come and go: the policies."""

    def joined(self, endpoint: Endpoint) -> None:
        """It may be chosen once it is ready."""
        ...

    def left(self, endpoint: Endpoint) -> None:
        """It is not chosen again."""
        ...


def _identity(member: Member) -> tuple[object, ...]:
    """What makes it another engine when it changes."""
    return member.address, member.role, member.events


class Roster:
    """The one that adds endpoints to a fleet and takes them away."""

    def __init__(
        self, fleet: Fleet, book: HealthBook, listeners: Sequence[Listener], drain_s: float
    ) -> None:
        """Begin with nobody.

        Args:
            fleet: Where endpoints are added; empty.
            book: Told of them, and asked to have them drained.
            listeners: Told when one joins and when it is gone.
            drain_s: An endpoint that leaves is dropped after so many seconds at the latest.
        """
        self._fleet, self._book, self._listeners = fleet, book, listeners
        self._drain_s = drain_s
        self._wanted: dict[str, dict[str, Member]] = {source: {} for source in SOURCES}
        self._members: dict[str, Member] = {}
        """Of the endpoints that are there, leaving ones included."""
        self._leaving_since_s: dict[str, float] = {}
        self._drained: set[str] = set()
        """Endpoints that a person took out of service."""

    def sources_of(self, name: str) -> list[str]:
        """Which sources name an endpoint."""
        return [source for source in SOURCES if name in self._wanted[source]]

    def is_leaving(self, name: str) -> bool:
        """Whether an endpoint is there only until its requests have ended."""
        return name in self._leaving_since_s

    def is_drained(self, name: str) -> bool:
        """Whether a person took it out of service."""
        return name in self._drained

    def declare(self, source: str, members: Sequence[Member], now_s: float) -> None:
        """All that one source wants from now on; of two alike the first counts."""
        wanted: dict[str, Member] = {}
        for member in members[:MEMBERS_MAX]:
            wanted.setdefault(member.title, member)
        self._wanted[source] = wanted
        self._reconcile(now_s)

    def add(self, member: Member, now_s: float) -> bool:
        """An engine joins over the API.

        Returns:
            Whether it is new; one that is there as described already is none.

        Raises:
            RefusedError: Another engine has the name or the address.
            InputError: There are too many.
        """
        for other in self._merged().values():
            if other.title == member.title and (other.address, other.role) != (
                member.address,
                member.role,
            ):
                raise RefusedError(
                    f"{member.title} is another engine, {other.url}: take a new name"
                )
            if other.address == member.address and other.title != member.title:
                raise RefusedError(f"{member.url} is there as {other.title}: use that name")
        if len(self._wanted[API]) >= MEMBERS_MAX:
            raise InputError(f"there are {MEMBERS_MAX} engines already: remove one first")
        is_new = not self.sources_of(member.title)
        self._wanted[API][member.title] = member
        self._reconcile(now_s)
        return is_new

    def remove(self, name: str, now_s: float) -> bool:
        """An engine leaves over the API; it drains.

        Returns:
            Whether it was there.

        Raises:
            RefusedError: The file or etcd names it, and would bring it back.
        """
        fixed = [source for source in self.sources_of(name) if source in (FILE, ETCD)]
        if fixed:
            raise RefusedError(
                f"{name} is named by {fixed[0]}: take it out there, or drain it here"
            )
        found = [self._wanted[source].pop(name, None) for source in (STATIC, API)]
        self._reconcile(now_s)
        return any(found)

    def drain(self, name: str, *, is_draining: bool) -> None:
        """Take an endpoint out of service, or put it back; it stays in the fleet.

        Raises:
            InputError: There is none of that name.
        """
        if name not in self._members:
            raise InputError(f"there is no endpoint {name}: see GET /workers")
        (self._drained.add if is_draining else self._drained.discard)(name)
        self._book.drain(name, is_draining=is_draining or self.is_leaving(name))

    def tick(self, now_s: float) -> None:
        """Let those go whose requests have ended, or who took too long."""
        for name in list(self._leaving_since_s):
            endpoint = self._fleet.find(name)
            assert endpoint is not None
            is_late = now_s - self._leaving_since_s[name] >= self._drain_s
            if endpoint.num_in_flight == 0 or is_late:
                self._drop(endpoint)

    def _merged(self) -> dict[str, Member]:
        """What all sources want together; the first counts where two disagree."""
        merged: dict[str, Member] = {}
        taken: set[tuple[str, int]] = set()
        for source in SOURCES:
            for name, member in self._wanted[source].items():
                if name not in merged and member.address not in taken:
                    merged[name] = member
                    taken.add(member.address)
        return merged

    def _reconcile(self, now_s: float) -> None:
        wanted = self._merged()
        for name in [name for name in self._members if name not in wanted]:
            if not self.is_leaving(name):
                self._leaving_since_s[name] = now_s
                self._book.drain(name, is_draining=True)
                log.info("an endpoint leaves. name=%s", name)
        for name, member in wanted.items():
            known = self._members.get(name)
            if known is not None and _identity(known) != _identity(member):
                # What runs there still ends; nothing of it is known of the engine that comes.
                endpoint = self._fleet.find(name)
                assert endpoint is not None
                self._drop(endpoint)
                known = None
            if known is None:
                self._join(member, now_s)
            elif self._leaving_since_s.pop(name, None) is not None:
                self._book.drain(name, is_draining=name in self._drained)
                log.info("an endpoint stays after all. name=%s", name)
            if member != known:
                self._members[name] = member
                endpoint = self._fleet.find(name)
                assert endpoint is not None
                endpoint.weight = member.weight
        self.tick(now_s)

    def _join(self, member: Member, now_s: float) -> None:
        host, port = member.address
        endpoint = Endpoint(
            member.title,
            host,
            port,
            member.role,
            weight=member.weight,
            joined_at_s=now_s,
            events=member.events,
        )
        self._members[member.title] = member
        self._fleet.join(endpoint)
        self._book.join(endpoint, now_s)
        for listener in self._listeners:
            listener.joined(endpoint)
        log.info("an endpoint joins. name=%s url=%s", member.title, member.url)

    def _drop(self, endpoint: Endpoint) -> None:
        name = endpoint.name
        self._leaving_since_s.pop(name, None)
        self._drained.discard(name)
        del self._members[name]
        self._fleet.leave(name)
        self._book.leave(name)
        for listener in self._listeners:
            listener.left(endpoint)
        log.info("an endpoint is gone. name=%s", name)
