"""An engine in virtual time: a queue, one prefill after another, decoding beside it, a cache."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvkeep.router.events.block_events import BlockEvent
from kvkeep.testing.fleet.block_cache import SimulatedBlockCache


class Planner(Protocol):
    """Virtual time, or one that can be frozen."""

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Plan an action."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How fast and how large a simulated engine is."""

    prefill_tokens_s: float = 10_000.0
    step_s: float = 0.01
    """What any prefill takes at least."""
    inter_token_s: float = 0.02
    """Between two tokens of a lone request; each other one that decodes adds ``crowding``."""
    crowding: float = 0.02
    """By which share each decoding request slows prefill and decoding."""
    num_blocks: int = 2048
    block_tokens: int = 32
    running_max: int = 64
    event_delay_s: float = 0.01
    """From a change of the cache until the router hears of it."""


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """A prompt on an engine, and whom to tell what becomes of it."""

    token_ids: Sequence[int]
    answer_ids: Sequence[int]
    began: Callable[["SimulatedRequest"], None]
    ended: Callable[["SimulatedRequest"], None]
    """Also called when the engine dies, with ``is_failed`` set."""
    hold_s: float = 0.0
    """A prefill for another engine: how long its blocks are kept afterwards unless claimed."""
    cached_blocks: int = 0
    """Leading blocks that the engine had when it began to compute."""
    cached_tokens: int = 0
    is_failed: bool = False
    hashes: list[int] = field(default_factory=list)


class SimulatedEngine:
    """One engine. Every promise is kept to each request once: began, then ended; or ended alone."""

    def __init__(
        self,
        time: Planner,
        seed: int,
        settings: EngineSettings,
        tell: Callable[[BlockEvent], None],
    ) -> None:
        """Start idle and empty.

        Args:
            time: Everybody's.
            seed: Of its block hashes.
            settings: How fast it is.
            tell: Called with each event of its cache, ``event_delay_s`` late.
        """
        self._time, self._settings, self._tell = time, settings, tell
        self.cache = SimulatedBlockCache(
            settings.num_blocks, settings.block_tokens, seed, self._announce
        )
        self._waiting: deque[SimulatedRequest] = deque()
        # Kept in order: the order in which requests of a dead engine end is part of the run.
        self._running: dict[SimulatedRequest, None] = {}
        self._held: set[SimulatedRequest] = set()
        self._prefilling: SimulatedRequest | None = None
        self.is_alive = True
        self.num_computed = 0
        """Prompt tokens computed."""
        self.num_prompt = 0
        """Prompt tokens of all requests that began."""
        self.busy_s = 0.0
        """Seconds of prefill."""

    def _announce(self, event: BlockEvent) -> None:
        self._time.after(self._settings.event_delay_s, lambda: self._tell_if_alive(event))

    def _tell_if_alive(self, event: BlockEvent) -> None:
        if self.is_alive:
            self._tell(event)

    # ---- requests

    def submit(self, request: SimulatedRequest) -> None:
        """Take a request; a dead engine refuses it."""
        if not self.is_alive:
            request.is_failed = True
            request.ended(request)
            return
        request.hashes = self.cache.hashes_of(request.token_ids)
        self._waiting.append(request)
        self._start_next()

    def _start_next(self) -> None:
        if self._prefilling or not self._waiting or not self.is_alive:
            return
        if len(self._running) >= self._settings.running_max:
            return
        request = self._waiting[0]
        depth = self.cache.depth(request.hashes)
        if not self.cache.take(request.hashes, request.token_ids):
            if self.cache.num_held == 0:
                # It would not fit into the empty cache either.
                self._waiting.popleft()
                request.is_failed = True
                request.ended(request)
            return
        self._waiting.popleft()
        self._prefilling = request
        settings, num_tokens = self._settings, len(request.token_ids)
        # The last token is computed even of a prompt that is there whole, and with it its block.
        request.cached_blocks = min(depth, (num_tokens - 1) // settings.block_tokens)
        request.cached_tokens = request.cached_blocks * settings.block_tokens
        num_computed = num_tokens - request.cached_tokens
        crowded = 1 + settings.crowding * len(self._running)
        prefill_s = settings.step_s + crowded * num_computed / settings.prefill_tokens_s
        self.num_prompt += num_tokens
        self.num_computed += num_computed
        self.busy_s += prefill_s
        self._time.after(prefill_s, lambda: self._prefilled(request))

    def _prefilled(self, request: SimulatedRequest) -> None:
        if not self.is_alive or self._prefilling is not request:
            return
        self._prefilling = None
        self._running[request] = None
        request.began(request)
        settings = self._settings
        crowded = 1 + settings.crowding * (len(self._running) - 1)
        decode_s = crowded * settings.inter_token_s * len(request.answer_ids)
        self._time.after(decode_s, lambda: self._decoded(request))
        self._start_next()

    def _decoded(self, request: SimulatedRequest) -> None:
        if not self.is_alive or request not in self._running:
            return
        del self._running[request]
        self._keep_answer(request)
        if request.hold_s:
            self._held.add(request)
            self._time.after(request.hold_s, lambda: self._lease_over(request))
        else:
            self.cache.give_back(request.hashes)
        request.ended(request)
        self._start_next()

    def _keep_answer(self, request: SimulatedRequest) -> None:
        """The answer's full blocks are found again by the next turn of the conversation."""
        sequence = [*request.token_ids, *request.answer_ids]
        hashes = self.cache.hashes_of(sequence)
        if self.cache.take(hashes, sequence):
            self.cache.give_back(request.hashes)
            request.hashes = hashes

    def abort(self, request: SimulatedRequest) -> None:
        """Drop a request, whose client left; nothing more is told of it, and nothing held."""
        if request in self._waiting:
            self._waiting.remove(request)
            return
        if self._prefilling is request:
            self._prefilling = None
        elif request in self._running:
            del self._running[request]
        else:
            return
        self.cache.give_back(request.hashes)
        self._start_next()

    # ---- hand-off

    def claim(self, request: SimulatedRequest) -> bool:
        """End the holding of a prefill's blocks: they were fetched, or the lease is over.

        Returns:
            Whether they were still held; if not, what they are now is anybody's.
        """
        if request not in self._held:
            return False
        self._held.discard(request)
        self.cache.give_back(request.hashes)
        self._start_next()
        return True

    def _lease_over(self, request: SimulatedRequest) -> None:
        self.claim(request)

    # ---- life

    def kill(self) -> None:
        """Die: every request ends as failed, the cache is gone, nothing is told any more."""
        self.is_alive = False
        lost = [*self._waiting, *self._running]
        lost += [self._prefilling] if self._prefilling else []
        self._waiting.clear()
        self._running.clear()
        self._held.clear()
        self._prefilling = None
        for request in lost:
            request.is_failed = True
            request.ended(request)

    @property
    def num_offered(self) -> int:
        """Prefills whose blocks are kept for another engine."""
        return len(self._held)

    @property
    def num_waiting(self) -> int:
        """Requests that are not computed yet."""
        return len(self._waiting)

    def check_idle(self) -> None:
        """Raise AssertionError if anything is left of requests that all ended."""
        self.cache.check()
        assert not self._waiting
        assert not self._running
        assert self._prefilling is None
        assert not self.is_alive or self._held or self.cache.num_held == 0
