"""A session stays where it began."""

from collections import OrderedDict
from collections.abc import Sequence

from kvkeep.router.policies.base import NO_ENDPOINT, Choice, Needs
from kvkeep.router.policies.consistent_hash import LOAD_FACTOR, ConsistentHash
from kvkeep.router.policies.ring import spot_of
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint

SESSIONS_MAX = 65_536
"""Sessions remembered, about 250 bytes each. A forgotten one begins anew at its key's home, which
is where it was unless that one had no room when it began, or the fleet has changed."""

SESSION_IDLE_S = 3600.0
"""After so long an engine has used its cache for others: the session may as well begin anew."""


class SessionAffinity:
    """Begins each session by consistent hash with bounded loads, then stays as long as it can.

    Unlike ``consistent_hash``, a session moves neither when endpoints join nor for load.
    """

    name = "session_affinity"
    needs = Needs.KEY

    def __init__(
        self,
        load_factor: float = LOAD_FACTOR,
        *,
        sessions_max: int = SESSIONS_MAX,
        idle_s: float = SESSION_IDLE_S,
    ) -> None:
        """Start with no session.

        Args:
            load_factor: Bound on the load of the endpoint where a session begins.
            sessions_max: Sessions remembered, at least 1; the longest unused one is forgotten.
            idle_s: After which a session begins anew.
        """
        self._begin = ConsistentHash(load_factor)
        self._sessions_max, self._idle_s = sessions_max, idle_s
        # By the key's hash and not the key, so that a session takes the same room whatever its key.
        self._sessions: OrderedDict[int, tuple[str, float]] = OrderedDict()

    def choose(
        self,
        request: RequestView,
        ready: Sequence[Endpoint],
        now_s: float,
        *,
        explain: bool = False,
    ) -> Choice:
        """Choose where the session is, or where it should begin."""
        if not ready:
            return NO_ENDPOINT
        if request.key is None:
            return self._begin.choose(request, ready, now_s, explain=explain)
        session = spot_of(request.key)
        endpoint = self._find(session, ready, now_s)
        if endpoint is None:
            begun = self._begin.choose(request, ready, now_s, explain=explain)
            endpoint = begun.endpoint
            choice = Choice(endpoint, "new session, " + begun.reason, begun.considered)
        else:
            considered = ((endpoint.name, 0.0, "where the session is"),) if explain else ()
            choice = Choice(endpoint, "where the session is", considered)
        if endpoint is not None and not explain:
            self._keep(session, endpoint, now_s)
        return choice

    def _find(self, session: int, ready: Sequence[Endpoint], now_s: float) -> Endpoint | None:
        name, used_at_s = self._sessions.get(session, ("", 0.0))
        if not name or now_s - used_at_s > self._idle_s:
            return None
        return next((endpoint for endpoint in ready if endpoint.name == name), None)

    def _keep(self, session: int, endpoint: Endpoint, now_s: float) -> None:
        self._sessions[session] = (endpoint.name, now_s)
        self._sessions.move_to_end(session)
        if len(self._sessions) > self._sessions_max:
            self._sessions.popitem(last=False)

    def __len__(self) -> int:
        """Sessions remembered."""
        return len(self._sessions)

    def joined(self, endpoint: Endpoint) -> None:
        """New sessions may begin there; those that have begun stay where they are."""
        self._begin.joined(endpoint)

    def left(self, endpoint: Endpoint) -> None:
        """Its sessions begin anew when they are next heard of."""
        self._begin.left(endpoint)
