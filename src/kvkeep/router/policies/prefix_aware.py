"""Where the prompt will be answered soonest: its prefix counts, and so does the queue before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvkeep.router.policies.base import NO_ENDPOINT, Choice, Needs
from kvkeep.router.policies.least_loaded import LeastLoaded
from kvkeep.router.policies.load import LoadBound, weight_of
from kvkeep.router.policies.prefill_rates import PrefillRates
from kvkeep.router.policies.recent_work import RecentWork
from kvkeep.router.policies.ring import Rings
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint


@dataclass(frozen=True, slots=True)
class PrefixSettings:
    """What the policy weighs."""

    load_factor: float = 1.5
    """How far above the mean load an endpoint may go, whatever it holds. Wider than consistent
    hashing's: a hot prefix is worth a queue, of which the score already takes account."""
    tokens_per_request: float = 64.0
    """Prompt tokens that one request in flight is worth: its decoding slows prefill down."""
    tie_share: float = 0.05
    """Endpoints within this share of the whole prompt's work are as good as each other; the ring
    then decides, so that prompts which share only a short beginning spread over the fleet."""
    balance_share: float = 0.05
    """What a token given lately, beyond the mean of all endpoints, counts for as if still queued.
    Enough to send the next conversation elsewhere, too little to move one that is under way."""
    load_share: float = 0.1
    """What loading a token from a tier costs, compared with computing it."""


class _Candidate(NamedTuple):
    endpoint: Endpoint
    num_blocks: int
    num_loadable: int
    num_uncached: int
    score_s: float
    work: float
    """The tokens behind the score."""
    has_room: bool


class PrefixAware:
    """Chooses the least expected work: tokens not cached, tokens queued, requests in flight.

    New prefixes spread by consistent hash. An endpoint over its bound is passed over; the next best
    then computes the prefix too, and holds it from then on: a hot prefix gets as many holders as
    its load needs.
    """

    name = "prefix_aware"
    needs = Needs.PREFIX | Needs.TOKENS

    def __init__(
        self,
        index: PrefixIndex,
        settings: PrefixSettings | None = None,
        *,
        is_approximate: bool = True,
    ) -> None:
        """Choose by an index.

        Args:
            index: What is held where; others may feed it events.
            settings: What to weigh.
            is_approximate: The blocks of a request are of text, not of tokens: what responses
                report in tokens is then converted by proportion.
        """
        self.index = index
        self._settings = settings or PrefixSettings()
        self.is_approximate = is_approximate
        self._rates = PrefillRates()
        self._recent = RecentWork()
        self._rings = Rings()
        self._prefixless = LeastLoaded()

    # ---- choosing

    def choose(
        self,
        request: RequestView,
        ready: Sequence[Endpoint],
        now_s: float,
        *,
        explain: bool = False,
    ) -> Choice:
        """Choose the least work, of nearly equals the first on the ring."""
        if not ready:
            return NO_ENDPOINT
        if not request.prefix:
            choice = self._prefixless.choose(request, ready, now_s, explain=explain)
            return Choice(
                choice.endpoint,
                "no full block, " + choice.reason,
                choice.considered,
                request.num_tokens or 0,
            )
        prefix = request.prefix
        num_tokens = request.num_tokens or len(prefix) * self.index.block_tokens
        candidates = self._weigh(prefix, num_tokens, ready, now_s)
        chosen, reason = self._decide(prefix, num_tokens, ready, candidates)
        considered = tuple(map(_described, candidates)) if explain else ()
        return Choice(chosen.endpoint, reason, considered, chosen.num_uncached, chosen.num_loadable)

    def _weigh(
        self, prefix: Sequence[int], num_tokens: int, ready: Sequence[Endpoint], now_s: float
    ) -> list[_Candidate]:
        names = [endpoint.name for endpoint in ready]
        held = self.index.match(prefix, names)
        loadable = self.index.match_tiers(prefix, names) if self.index.num_in_tiers else held
        excess = self._recent.excess(names, now_s)
        rates = self._rates.of(names, now_s)
        bound = LoadBound(ready, self._settings.load_factor)
        return [
            self._candidate(each, num_tokens, surplus, rate, has_room=bound.has_room(each[0]))
            for each, surplus, rate in zip(
                zip(ready, held, loadable, strict=True), excess, rates, strict=True
            )
        ]

    def _candidate(
        self,
        held: tuple[Endpoint, int, int],
        num_tokens: int,
        excess: float,
        rate: float,
        *,
        has_room: bool,
    ) -> _Candidate:
        endpoint, num_blocks, num_loadable = held
        settings, block_tokens = self._settings, self.index.block_tokens
        # An engine computes the last token even of a prompt that it holds whole.
        cached = min(num_blocks * block_tokens, num_tokens - 1)
        reachable = min(num_loadable * block_tokens, num_tokens - 1)
        num_uncached = num_tokens - reachable
        work = num_uncached + settings.load_share * (reachable - cached) + endpoint.queued_tokens
        work += settings.tokens_per_request * endpoint.num_in_flight
        work += settings.balance_share * excess
        score_s = work / (rate * weight_of(endpoint))
        return _Candidate(endpoint, num_blocks, num_loadable, num_uncached, score_s, work, has_room)

    def _decide(
        self,
        prefix: Sequence[int],
        num_tokens: int,
        ready: Sequence[Endpoint],
        candidates: Sequence[_Candidate],
    ) -> tuple[_Candidate, str]:
        best = min(candidates, key=_score)
        able = [each for each in candidates if each.has_room]
        if not able:
            return best, f"holds {best.num_blocks} of {len(prefix)} blocks"
        chosen = min(able, key=_score)
        per_token_s = chosen.score_s / chosen.work
        highest_s = chosen.score_s + self._settings.tie_share * num_tokens * per_token_s
        ties = {each.endpoint.name: each for each in able if each.score_s <= highest_s}
        if len(ties) > 1:
            # Where what is known ends, prompts differ: that block says which of them this is.
            deepest = max(each.num_blocks for each in candidates)
            spot = prefix[min(deepest, len(prefix) - 1)]
            ring = self._rings.of(ready)
            chosen = next(
                ties[endpoint.name]
                for endpoint in ring.walk(spot << SPOT_SHIFT)
                if endpoint.name in ties
            )
        reason = f"holds {chosen.num_blocks} of {len(prefix)} blocks"
        if best.endpoint is not chosen.endpoint and not best.has_room:
            reason += f", {best.endpoint.name} is over its bound"
        elif len(ties) > 1:
            reason += f", first of {len(ties)} equals on the ring"
        return chosen, reason

    # ---- learning

    def sent(self, request: RequestView, choice: Choice, now_s: float) -> None:
        """The endpoint will hold the prompt."""
        if choice.endpoint is not None and request.prefix:
            self.index.assume(choice.endpoint.name, request.prefix)
            self._recent.give(choice.endpoint.name, choice.num_uncached, now_s)

    def first_byte(self, request: RequestView, choice: Choice, now_s: float, wait_s: float) -> None:
        """The prompt is computed."""
        if choice.endpoint is not None:
            self._rates.first_byte(choice.endpoint.name, choice.num_uncached, now_s, wait_s)

    def ended(
        self,
        request: RequestView,
        choice: Choice,
        cached_tokens: int | None,
        num_tokens: int | None,
    ) -> None:
        """Compare what the endpoint held with what it was believed to hold."""
        if choice.endpoint is None or not request.prefix:
            return
        prefix = request.prefix
        reported = None
        if cached_tokens is not None:
            block_tokens = float(self.index.block_tokens)
            if self.is_approximate and num_tokens:
                block_tokens = max(1.0, num_tokens / len(prefix))
            # Rounded up: a full hit is reported a token or a block short of the prompt.
            reported = min(len(prefix), -int(-cached_tokens // block_tokens))
        self.index.correct(choice.endpoint.name, prefix, choice.num_cached_blocks, reported)

    def joined(self, endpoint: Endpoint) -> None:
        """It holds nothing, as far as is known."""
        self._rings.forget()
        self._prefixless.joined(endpoint)

    def left(self, endpoint: Endpoint) -> None:
        """What it held is out of reach."""
        self._rings.forget()
        self._prefixless.left(endpoint)
        self._rates.left(endpoint.name)
        self._recent.left(endpoint.name)
        self.index.drop(endpoint.name)


SPOT_SHIFT = 4
"""Block hashes have 60 bits, spots on the ring 64."""


def _score(candidate: _Candidate) -> float:
    return candidate.score_s


def _described(candidate: _Candidate) -> tuple[str, float, str]:
    endpoint = candidate.endpoint
    why = (
        f"holds {candidate.num_blocks} blocks and {candidate.num_loadable - candidate.num_blocks} "
        f"more in tiers, computes {candidate.num_uncached} tokens after {endpoint.queued_tokens} "
        f"queued, {endpoint.num_in_flight} in flight"
    )
    return (
        endpoint.name,
        candidate.score_s,
        why + ("" if candidate.has_room else ", over its bound"),
    )
