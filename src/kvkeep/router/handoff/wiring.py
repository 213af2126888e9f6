"""What a router needs besides to hand off: a policy for each role, and the desk."""

from typing import TYPE_CHECKING

from kvkeep.router.handoff.desk import HandOffDesk
from kvkeep.router.handoff.settings import HandOffSettings
from kvkeep.router.health.book import HealthBook
from kvkeep.router.limits.bucket import RetryBudget
from kvkeep.router.policies.base import Needs, Policy
from kvkeep.router.policies.prefix_aware import PrefixAware
from kvkeep.router.policies.round_robin import RoundRobin
from kvkeep.router.router import Router
from kvkeep.router.snapshot import Endpoint, Fleet, Role

if TYPE_CHECKING:
    from kvkeep.router.relay.relay import Relay


class OfRole:
    """Tells a policy of the endpoints of one role only."""

    def __init__(self, policy: Policy, role: Role) -> None:
        self._policy, self._role = policy, role

    def joined(self, endpoint: Endpoint) -> None:
        """It may be chosen once it is ready."""
        if endpoint.role is self._role:
            self._policy.joined(endpoint)

    def left(self, endpoint: Endpoint) -> None:
        """It is not chosen again."""
        if endpoint.role is self._role:
            self._policy.left(endpoint)


class Fronts:
    """The routers of a fleet that hands off, one for each purpose."""

    def __init__(
        self, fleet: Fleet, policy: Policy, decode_policy: Policy, book: HealthBook
    ) -> None:
        """Know the policies; ``make`` makes routers.

        Args:
            fleet: All endpoints.
            policy: Chooses prefill engines.
            decode_policy: Chooses decode engines.
            book: Told how requests end.
        """
        self._fleet, self._policy, self._decode_policy, self._book = (
            fleet,
            policy,
            decode_policy,
            book,
        )
        self.listeners = [OfRole(policy, Role.PREFILL), OfRole(decode_policy, Role.DECODE)]

    def make_decode_router(self, retries: RetryBudget) -> Router:
        """The one that clients' requests go by; it looks at what the hand-off wants to know too."""
        needs = self._policy.needs | Needs.TOKENS | Needs.MODEL
        return Router(
            self._fleet, self._decode_policy, self._book, retries, role=Role.DECODE, needs=needs
        )

    def make_desk(
        self, relay: "Relay", settings: HandOffSettings, retries: RetryBudget
    ) -> HandOffDesk:
        """What the relay begins hand-offs with."""
        prefill = Router(self._fleet, self._policy, self._book, retries, role=Role.PREFILL)
        release = Router(self._fleet, RoundRobin(), self._book, retries, role=Role.DECODE)
        return HandOffDesk(relay, settings, prefill, release)


def share_index(policy: Policy) -> Policy | None:
    """A policy for another role that believes what this one believes; None if it is of no use."""
    if not isinstance(policy, PrefixAware):
        return None
    return PrefixAware(policy.index, is_approximate=policy.is_approximate)
