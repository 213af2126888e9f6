"""A router's decisions over simulated engines: the real policies and index, doubles of the rest."""

import statistics
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from kvkeep.router.events.block_events import BlockEvent
from kvkeep.router.policies.base import Choice, Learns, Policy
from kvkeep.router.policies.prefix_aware import PrefixAware
from kvkeep.router.prefix_hashes import text_hashes, token_hashes, token_root
from kvkeep.router.prefix_index import BLOCKS_MAX, PrefixIndex
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint, EndpointState
from kvkeep.router.tokenizing import TEXT_BLOCK_TOKENS
from kvkeep.testing.fleet.engine import EngineSettings, SimulatedEngine, SimulatedRequest
from kvkeep.testing.fleet.workload import (
    Ask,
    Chat,
    ChatSettings,
    Conversation,
    Documents,
    DocumentSettings,
)
from kvkeep.testing.virtual_time import VirtualTime

RETRY_S = 1.0
"""After which a client asks again whose request failed."""


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What is simulated."""

    num_engines: int = 4
    engine: EngineSettings = field(default_factory=EngineSettings)
    chat: ChatSettings | None = field(default_factory=ChatSettings)
    documents: DocumentSettings | None = None
    has_events: bool = True
    """The index is of token blocks and hears events; else of text, and hears responses only."""
    index_blocks_max: int = BLOCKS_MAX
    serve_s: float = 600.0
    churn_s: float = 0.0
    """Mean time between two changes: an engine restarts, comes, goes or is replaced. 0: none."""
    num_engines_range: tuple[int, int] = (2, 8)
    """How few and how many engines churn leaves."""


@dataclass(slots=True)
class FleetReport:
    """What came of a run."""

    num_asked: int = 0
    """Questions of clients."""
    num_answered: int = 0
    num_requests: int = 0
    """Tries: a request that fails is sent again."""
    num_failed: int = 0
    num_changes: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    index_errors: list[int] = field(default_factory=list)
    """Per request, how many blocks the belief about the chosen engine was off."""
    ttft_s: list[float] = field(default_factory=list)
    requests_by_engine: dict[str, int] = field(default_factory=dict)
    busy_by_engine: dict[str, float] = field(default_factory=dict)
    """Seconds of prefill."""

    @property
    def computed_share(self) -> float:
        """Prompt tokens computed over prompt tokens asked."""
        return self.computed_tokens / max(1, self.prompt_tokens)

    @property
    def unfairness(self) -> float:
        """Most requests of an engine over the mean."""
        counts = list(self.requests_by_engine.values())
        return max(counts) / statistics.mean(counts)

    def ttft_quantile(self, percent: int) -> float:
        """Seconds to the first byte that so many of a hundred requests stay below."""
        return statistics.quantiles(self.ttft_s, n=100)[percent - 1]

    def index_error_quantile(self, percent: int) -> float:
        """Blocks that the belief of so many of a hundred requests is off by at most."""
        return statistics.quantiles(self.index_errors, n=100)[percent - 1]


class FleetSimulation:
    """One run of one seed."""

    def __init__(
        self, seed: int, settings: FleetSettings, make_policy: Callable[[PrefixIndex], Policy]
    ) -> None:
        """Set up.

        Args:
            seed: Decides everything.
            settings: What is simulated.
            make_policy: The policy; it may use the index that is fed here.
        """
        self.settings, self.time, self.chance = settings, VirtualTime(), Random(seed)
        block_tokens = settings.engine.block_tokens if settings.has_events else TEXT_BLOCK_TOKENS
        self.index = PrefixIndex(block_tokens, settings.index_blocks_max)
        self.policy = make_policy(self.index)
        self.report = FleetReport()
        self.engines: dict[str, SimulatedEngine] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self._ready: tuple[Endpoint, ...] = ()
        self._num_names = 0
        for _ in range(settings.num_engines):
            self.add_engine()
        if settings.chat is not None:
            chat = Chat(self.chance, settings.chat)
            for _ in range(settings.chat.num_users):
                self._talk(chat, chat.begin())
        if settings.documents is not None:
            documents = Documents(self.chance, settings.documents)
            self.time.after(documents.gap_s(), lambda: self._read(documents))
        if settings.churn_s:
            self.time.after(self.chance.expovariate(1 / settings.churn_s), self._change)

    def run(self) -> FleetReport:
        """Serve, then let everything end, and see that nothing is left."""
        self.serve_until(self.settings.serve_s)
        self.drain()
        return self.report

    def serve_until(self, end_s: float) -> None:
        """Let virtual time pass."""
        self.time.run_until(end_s)

    def drain(self) -> None:
        """Ask nothing new, wait for what was asked, check, and gather the engines' counts."""
        self.time.run_until(self.time.now_s() + 600.0)
        for name, engine in self.engines.items():
            engine.check_idle()
            self._gather(name, engine)
        for endpoint in self.endpoints.values():
            assert (endpoint.num_in_flight, endpoint.queued_tokens) == (0, 0)
        self.index.check()

    # ---- engines

    def add_engine(self) -> str:
        """Start an engine under a name that was never used."""
        name = f"engine-{self._num_names}"
        self._num_names += 1
        endpoint = Endpoint(name=name, host="simulated", port=1, state=EndpointState.READY)
        self.endpoints[name] = endpoint
        self.policy.joined(endpoint)
        self._start(name)
        return name

    def _start(self, name: str) -> None:
        engine = SimulatedEngine(
            self.time,
            self.chance.getrandbits(63),
            self.settings.engine,
            lambda event: self._told(name, engine, event),
        )
        self.engines[name] = engine
        self._remake_ready()

    def _told(self, name: str, engine: SimulatedEngine, event: BlockEvent) -> None:
        if self.settings.has_events and self.engines.get(name) is engine:
            self.index.apply(name, event)

    def _remake_ready(self) -> None:
        self._ready = tuple(
            self.endpoints[name] for name, engine in self.engines.items() if engine.is_alive
        )

    def remove_engine(self, name: str) -> None:
        """Kill an engine and take it out of the fleet."""
        engine, endpoint = self.engines.pop(name), self.endpoints.pop(name)
        self._remake_ready()
        self.policy.left(endpoint)
        engine.kill()
        self._gather(name, engine)

    def restart_engine(self, name: str) -> None:
        """Kill an engine and start it again, empty, under its name."""
        engine = self.engines[name]
        engine.kill()
        self._gather(name, engine)
        self.index.drop(name)
        self._start(name)

    def _gather(self, name: str, engine: SimulatedEngine) -> None:
        self.report.prompt_tokens += engine.num_prompt
        self.report.computed_tokens += engine.num_computed
        busy = self.report.busy_by_engine
        busy[name] = busy.get(name, 0.0) + engine.busy_s
        engine.num_prompt = engine.num_computed = 0
        engine.busy_s = 0.0

    def _change(self) -> None:
        if self.time.now_s() >= self.settings.serve_s:
            return
        self.report.num_changes += 1
        names = list(self.engines)
        what = self.chance.choice(["restart", "replace", "grow", "shrink"])
        if what == "restart":
            self.restart_engine(self.chance.choice(names))
        fewest, most = self.settings.num_engines_range
        if what == "replace" or (what == "shrink" and len(names) > fewest):
            self.remove_engine(self.chance.choice(names))
        if what == "replace" or (what == "grow" and len(names) < most):
            self.add_engine()
        self.time.after(self.chance.expovariate(1 / self.settings.churn_s), self._change)

    # ---- clients

    def _talk(self, chat: Chat, conversation: Conversation) -> None:
        if self.time.now_s() >= self.settings.serve_s:
            return
        following = conversation if conversation.num_left else chat.begin()

        def ended() -> None:
            self.time.after(chat.think_s(), lambda: self._talk(chat, following))

        def begin() -> None:
            self._ask_first(chat.ask(conversation), ended)

        # Users do not all begin in one moment.
        self.time.after(chat.think_s() if not self.time.now_s() else 0.0, begin)

    def _read(self, documents: Documents) -> None:
        if self.time.now_s() >= self.settings.serve_s:
            return
        self._ask_first(documents.ask(), lambda: None)
        self.time.after(documents.gap_s(), lambda: self._read(documents))

    # ---- the router

    def _view(self, ask: Ask) -> RequestView:
        if not isinstance(self.policy, PrefixAware):
            return RequestView("/v1/completions", key=ask.user.encode(), num_tokens=None)
        if self.settings.has_events:
            prefix = token_hashes(ask.token_ids, self.index.block_tokens, token_root())
        else:
            # Each token stands for four bytes of text.
            prefix = text_hashes(array("I", ask.token_ids).tobytes())
        return RequestView("/v1/completions", prefix=prefix, num_tokens=len(ask.token_ids))

    def _ask_first(self, ask: Ask, ended: Callable[[], None]) -> None:
        self.report.num_asked += 1
        self._ask(ask, ended)

    def _ask(self, ask: Ask, ended: Callable[[], None]) -> None:
        view = self._view(ask)
        sent_at_s = self.time.now_s()
        choice = self.policy.choose(view, self._ready, sent_at_s)
        endpoint = choice.endpoint
        self.report.num_requests += 1
        if endpoint is None:
            self._failed(ask, ended)
            return
        exchange = _Exchange(self, view, choice, endpoint, sent_at_s)
        by_engine = self.report.requests_by_engine
        by_engine[endpoint.name] = by_engine.get(endpoint.name, 0) + 1

        def ended_there(request: SimulatedRequest) -> None:
            exchange.ended(request)
            if request.is_failed:
                self._failed(ask, ended)
            else:
                self.report.num_answered += 1
                ended()

        request = SimulatedRequest(ask.token_ids, ask.answer_ids, exchange.began, ended_there)
        self.engines[endpoint.name].submit(request)

    def _failed(self, ask: Ask, ended: Callable[[], None]) -> None:
        self.report.num_failed += 1
        self.time.after(RETRY_S, lambda: self._ask(ask, ended))


class _Exchange:
    """What the relay does around one request: the endpoint's counters, and the policy's lessons."""

    def __init__(
        self,
        simulation: FleetSimulation,
        view: RequestView,
        choice: Choice,
        endpoint: Endpoint,
        sent_at_s: float,
    ) -> None:
        self._simulation, self._view, self._choice = simulation, view, choice
        self._endpoint, self._sent_at_s = endpoint, sent_at_s
        self._queued = choice.num_uncached
        endpoint.num_in_flight += 1
        endpoint.queued_tokens += self._queued
        if isinstance(simulation.policy, Learns):
            simulation.policy.sent(view, choice, sent_at_s)

    def began(self, request: SimulatedRequest) -> None:
        """The first byte came."""
        simulation, now_s = self._simulation, self._simulation.time.now_s()
        self._leave_queue()
        wait_s = now_s - self._sent_at_s
        simulation.report.ttft_s.append(wait_s)
        if isinstance(simulation.policy, Learns):
            simulation.policy.first_byte(self._view, self._choice, now_s, wait_s)
        if self._view.prefix is not None and simulation.settings.has_events:
            # An engine never uses the block of a prompt's last token.
            most = (len(request.token_ids) - 1) // simulation.index.block_tokens
            believed = min(self._choice.num_cached_blocks, most)
            simulation.report.index_errors.append(abs(believed - request.cached_blocks))

    def ended(self, request: SimulatedRequest) -> None:
        """The exchange is over, well or not."""
        self._leave_queue()
        self._endpoint.num_in_flight -= 1
        if not isinstance(self._simulation.policy, Learns):
            return
        cached = None if request.is_failed else request.cached_tokens
        num_tokens = len(request.token_ids)
        self._simulation.policy.ended(self._view, self._choice, cached, num_tokens)

    def _leave_queue(self) -> None:
        self._endpoint.queued_tokens -= self._queued
        self._queued = 0
