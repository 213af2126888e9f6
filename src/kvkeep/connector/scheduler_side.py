"""The connector's half in the scheduler: which blocks to load, which to store, and for how long.

Nothing here waits for I/O. A question is sent when a request arrives and answered when it is
scheduled; while the answer is on its way the request is passed over for a step and others go on.
Blocks are handed to the ranks for storing only when the step that computed them is known to have
ended without a failed load on any rank: what is computed from a block that never arrived is wrong,
and no digest would tell. Runs on the engine core's one thread.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence, Set
from typing import Any, Literal

from kvkeep.client.prefixes import Answer, PrefixClient, PrefixLease, Question
from kvkeep.connector import compat
from kvkeep.connector.identity import Unsupported
from kvkeep.connector.lora import Adapters
from kvkeep.connector.metadata import LoadJob, LoadResult, StepMetadata, StepReport, StoreJob
from kvkeep.connector.scheduler.block_names import BlockNames
from kvkeep.connector.scheduler.handoff import Awaited, Handoffs, PrefillLeg
from kvkeep.connector.scheduler.requests import (
    LoadInFlight,
    RequestState,
    StoreInFlight,
    find_extras,
    skips_cache,
)
from kvkeep.connector.settings import ConnectorSettings
from kvkeep.connector.step_costs import StepCosts
from kvkeep.core.effects import NO_SLOT
from kvkeep.model.clock import Clock
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import HASH_BYTES, BlockHash, Namespace

log = logging.getLogger(__name__)

LEASE_MARGIN = 0.5
"""A lease is used only in this first part of its time: the rest belongs to the load."""
PINNED_SHARE_MAX = 0.25
"""Of the engine's blocks, at most this share is held for stores; beyond it none are stored, but
those of prompts that are handed over."""


class SchedulerSide:
    """Decides; the worker side copies."""

    def __init__(
        self,
        *,
        namespace: Namespace,
        block_tokens: int,
        num_ranks: int,
        settings: ConnectorSettings,
        prefixes: PrefixClient,
        clock: Clock,
        reset_namespace: Callable[[int], Namespace],
    ) -> None:
        self._base_namespace = namespace
        self._namespace = namespace
        self._block_tokens = block_tokens
        self._num_ranks = num_ranks
        self._settings = settings
        self._prefixes = prefixes
        self._clock = clock
        self._reset_namespace = reset_namespace
        self._num_resets = 0
        self._block_pool: Any = None
        self._requests: dict[str, RequestState] = {}
        self._adapters = Adapters()
        self._loads: list[LoadJob] = []
        self._loading: dict[str, deque[LoadInFlight]] = {}
        """By request id, in the order of the reports to come."""
        self._stores: dict[int, StoreInFlight] = {}
        self._computing: deque[tuple[int, StoreJob]] = deque()
        """Stores that wait for the report of the step that computes them."""
        self._computed: list[StoreJob] = []
        """Stores to be handed out with the next step."""
        self._job_ids = itertools.count(1)
        self._step = 0
        self._num_pinned = 0
        self._wait_left_s = settings.lookup_wait_ms / 1e3
        self._handoffs = Handoffs(
            prefixes.report_handoff,
            clock,
            block_tokens=block_tokens,
            wait_s=settings.handoff_wait_s,
        )
        self.costs = StepCosts(block_tokens)
        """Of this engine; another may be set before the first request."""
        self.shares_cores = False
        """Whether ranks that poll take cores from the daemon; set before the first request."""
        self.chain_key = b""
        """Keys the hashes of the tenant's blocks; set before the first request."""
        self.names: BlockNames | None = None
        """Who tells routers what stored blocks are of; None: nobody."""

    def bind_block_pool(self, block_pool: Any) -> None:
        """Take vLLM's block pool, to hold blocks while they are stored."""
        self._block_pool = block_pool

    # ---- lookup

    def add_request(self, request: Any) -> None:
        """A request arrived: ask for its prefix, so that the answer is there when it runs."""
        leg = self._handoffs.find_leg(request)
        try:
            extras = self._extras_of(request)
        except Unsupported as reason:
            log.info("kvkeep passes request %s by: %s", request.request_id, reason)
            if leg is not None:
                self._handoffs.pass_by(leg, reason, request)
            return
        hasher = BlockHasher(
            self._namespace, self._block_tokens, extras=extras, secret=self.chain_key
        )
        state = RequestState(request, hasher)
        if isinstance(leg, PrefillLeg):
            state.is_offered = True
        elif leg is not None:
            hashes = hasher.extend(request.all_token_ids)
            state.awaited = self._handoffs.await_blocks(leg, hashes, request)
            state.is_handed = state.awaited is not None
        self._requests[request.request_id] = state
        self._ask(state)

    def _extras_of(self, request: Any) -> dict[str, str]:
        return find_extras(request, self._adapters)

    def _ask(self, state: RequestState) -> None:
        state.is_asked = True
        request = state.request
        if not (self._settings.load and state.may_load) or skips_cache(request):
            return
        # One token stays to be computed, for the logits (vllm 0.32, v1/core/sched/scheduler.py:
        # a synchronous claim of the whole request ends in an assertion).
        num_blocks = (request.num_tokens - 1) // self._block_tokens
        hashes = state.hasher.extend(request.all_token_ids)[:num_blocks]
        # Even the question costs a short prompt of a fast engine more than it has to gain.
        if hashes and self._is_load_worth(state, num_blocks * self._block_tokens):
            # Of a handoff all is loaded, however fast this engine computes.
            rate = 0 if state.is_handed else int(self.costs.tokens_s)
            state.question = self._prefixes.ask(
                self._namespace, 0, hashes, rate, request.request_id
            )

    def _is_load_worth(self, state: RequestState, num_tokens: int) -> bool:
        """Whether to load; a handoff's tokens were computed elsewhere so that this engine won't."""
        return state.is_handed or self.costs.is_load_worth(num_tokens, self._clock.now_s())

    def match(self, request: Any, num_computed_tokens: int) -> int | None:
        """Tokens that can be loaded beyond those the engine has; None to be asked again.

        Called for a waiting request in every step until it is scheduled, so it is cheap when
        nothing changed, and changes nothing that a repeated call could not undo.
        """
        state = self._requests.get(request.request_id)
        if state is None or skips_cache(request):
            return 0
        if state.is_allocated:
            self._begin_again(state)
        if not state.is_asked:
            if state.awaited is not None and self._handoffs.is_early(state.awaited):
                return None
            self._ask(state)
        if state.question is not None:
            answer = self._answer(state.question)
            if answer is Answer.PENDING:
                return None
            state.question = None
            state.lease = None if answer is Answer.NOTHING else answer
        if state.awaited is not None and self._is_awaiting(
            state, state.awaited, num_computed_tokens
        ):
            return None
        lease = state.lease
        if lease is None:
            return 0
        if lease.deadline_s - self._clock.now_s() < lease.lease_s * (1 - LEASE_MARGIN):
            self._drop_lease(state)
            state.is_asked = False
            return self.match(request, num_computed_tokens)
        if not self._adapters.is_sure(request.lora_request):
            self._drop_lease(state)
            return 0
        state.num_local_blocks = num_computed_tokens // self._block_tokens
        num_tokens = max(0, len(lease.slots) * self._block_tokens - num_computed_tokens)
        if num_tokens and not self._is_load_worth(state, num_tokens):
            self._prefixes.release([lease], num_declined=num_tokens // self._block_tokens)
            state.lease = None
            state.num_stored = max(state.num_stored, len(lease.slots))
            return 0
        return num_tokens

    def _is_awaiting(self, state: RequestState, awaited: Awaited, num_computed_tokens: int) -> bool:
        """Whether blocks that were named to this request have yet to come."""
        num_lent = 0 if state.lease is None else len(state.lease.slots)
        if self._handoffs.must_wait(
            awaited,
            max(num_lent, num_computed_tokens // self._block_tokens),
            can_come=self._settings.load and state.may_load and self._prefixes.is_connected,
            request=state.request,
        ):
            self._drop_lease(state)
            state.is_asked = False
            return True
        state.awaited = None
        return False

    def _answer(self, question: Question) -> PrefixLease | Literal[Answer.NOTHING, Answer.PENDING]:
        """The answer so far; one step waits only so long for all of its requests."""
        begun_s = self._clock.now_s()
        answer = self._prefixes.answer(question, self._wait_left_s)
        self._wait_left_s = max(0.0, self._wait_left_s - (self._clock.now_s() - begun_s))
        return answer

    def _begin_again(self, state: RequestState) -> None:
        """A preempted request waits anew: its blocks are gone, and so is what it was lent."""
        self._drop_lease(state)
        state.is_allocated = state.is_asked = False
        state.block_ids = []

    def _drop_lease(self, state: RequestState) -> None:
        if state.question is not None:
            self._prefixes.forget(state.question)
            state.question = None
        if state.lease is not None:
            self._prefixes.release([state.lease])
            state.lease = None

    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> bool:
        """VLLM gave the request its blocks; plan the load of those it will not compute."""
        state = self._requests.get(request.request_id)
        if state is None:
            return not num_external_tokens
        state.is_allocated = True
        lease = state.lease
        if lease is None:
            return not num_external_tokens
        if num_external_tokens:
            first, end = self._loaded_range(state, num_external_tokens)
            job = LoadJob(
                req_id=request.request_id,
                hashes=b"".join(state.hasher.hashes[first:end]),
                slots=lease.slots[first:end],
                block_ids=tuple(blocks.get_block_ids()[0][first:end]),
                generation=lease.generation,
            )
            self._plan_load(job, lease, first)
        else:
            self._prefixes.release([lease])
        state.lease = None
        # What the pool holds need not be stored again.
        state.num_stored = max(state.num_stored, len(lease.slots))
        if self.names is not None:
            self.names.tell(request, state.hasher.hashes[: len(lease.slots)])
        return True

    def _loaded_range(self, state: RequestState, num_external_tokens: int) -> tuple[int, int]:
        first = state.num_local_blocks
        return first, first + -(-num_external_tokens // self._block_tokens)

    def _plan_load(self, job: LoadJob, lease: PrefixLease | None, first: int) -> None:
        load = LoadInFlight(lease, self._namespace, first, len(job.slots))
        self._loads.append(job)
        self._loading.setdefault(job.req_id, deque()).append(load)

    def plan_failure(self, req_id: str, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """Plan a load that every rank will decline, so that vLLM computes these blocks.

        Args:
            req_id: The request that was promised the load.
            block_ids: All its engine blocks.
            num_external_tokens: Tokens that vLLM counts as loaded.
        """
        state = self._requests.get(req_id)
        first, end = (
            (0, len(block_ids)) if state is None else self._loaded_range(state, num_external_tokens)
        )
        lost = tuple(block_ids[first:end])
        job = LoadJob(req_id, bytes(HASH_BYTES) * len(lost), (NO_SLOT,) * len(lost), lost)
        self._plan_load(job, None, first)

    # ---- one step

    def build_metadata(self) -> StepMetadata:
        """This step's loads, and stores of earlier steps; can't fail: vLLM counts on the loads."""
        self._wait_left_s = self._settings.lookup_wait_ms / 1e3
        self._step += 1
        loads, self._loads = self._loads, []
        stores, self._computed = self._computed, []
        return StepMetadata(
            self._namespace, self._base_namespace, self._step, loads=loads, stores=stores
        )

    def plan_stores(self, scheduler_output: Any, metadata: StepMetadata) -> bool:
        """Note which blocks this step computes; they are stored when it has ended well.

        Returns:
            True; after an exception the block ids of some requests are not known any more.
        """
        for req_id, found in compat.new_block_ids(scheduler_output).items():
            state = self._requests.get(req_id)
            if state is None:
                continue
            is_new, block_ids, num_computed = found
            group = list(block_ids[0]) if block_ids else []
            state.block_ids = group if is_new else state.block_ids + group
            num_scheduled = scheduler_output.num_scheduled_tokens.get(req_id, 0)
            job = self._plan_store(state, num_computed + num_scheduled)
            if job is not None:
                self._computing.append((metadata.step, job))
                metadata.is_awaited = True
        if self.shares_cores and not scheduler_output.num_scheduled_tokens:
            is_awaiting = any(state.awaited is not None for state in self._requests.values())
            metadata.may_rest = is_awaiting or self.has_stores_in_flight
        num_tokens = scheduler_output.total_num_scheduled_tokens
        loads = [len(job.slots) for job in metadata.loads]
        self.costs.begun(metadata.step, num_tokens, loads, self._clock.now_s())
        return True

    def _plan_store(self, state: RequestState, num_tokens: int) -> StoreJob | None:
        """Blocks of which this step computes the last token, as far as the tokens are final.

        Tokens that are only guessed (drafts) or not known yet are not among ``all_token_ids``.
        """
        if not (self._settings.store and state.may_store and self._prefixes.is_connected):
            return None
        request = state.request
        first = state.num_stored
        end = min(num_tokens, len(request.all_token_ids)) // self._block_tokens
        if end <= first or self._block_pool is None:
            return None
        if not self._adapters.is_sure(request.lora_request):
            state.may_store = False
            return None
        # What is over a limit now may be stored by a later step; a gap would make all behind it
        # unreachable. A handoff has no later step, and its blocks were the request's anyway.
        if not state.is_offered:
            end = min(end, first + self._num_pinnable())
            if end <= first or len(self._stores) >= self._settings.store_jobs_max:
                return None
        state.num_stored = end
        hashes = state.hasher.extend(request.all_token_ids)[first:end]
        block_ids = tuple(state.block_ids[first:end])
        blocks = [self._block_pool.blocks[block_id] for block_id in block_ids]
        compat.touch(self._block_pool, blocks)
        self._num_pinned += len(blocks)
        job_id = next(self._job_ids)
        self._stores[job_id] = StoreInFlight(state, first, blocks, self._num_ranks)
        if self.names is not None:
            self.names.tell(request, state.hasher.hashes[:end])
        return StoreJob(job_id, b"".join(hashes), block_ids, is_urgent=state.is_offered)

    def _num_pinnable(self) -> int:
        """Blocks that may be held for stores beside those that are."""
        limit = int(self._block_pool.num_gpu_blocks * PINNED_SHARE_MAX)
        return max(0, limit - self._num_pinned)

    def stop_storing(self) -> None:
        """Store nothing more of the requests in flight: their block ids are no longer sure."""
        for state in self._requests.values():
            state.may_store = False

    def take_report(self, report: StepReport | None, bad_block_ids: Set[int]) -> None:
        """What the ranks did in a step that has ended.

        Args:
            report: All ranks' together; None if none had anything to say.
            bad_block_ids: Engine blocks that a load of any rank left without their content.
        """
        if report is not None:
            self.costs.ended(report.step, self._clock.now_s())
            for job_id, num_ranks in report.finished_stores.items():
                self._finish_store(job_id, num_ranks)
            for req_id, result in report.loads.items():
                self._finish_load(req_id, result)
        if bad_block_ids:
            self._contain(bad_block_ids)
            # A step that was planned before this report may have gone on from the same blocks.
            self._discard_computing()
        elif report is not None:
            while self._computing and self._computing[0][0] <= report.step:
                self._computed.append(self._computing.popleft()[1])

    def _contain(self, bad_block_ids: Set[int]) -> None:
        """See to it that nobody reads a block that never arrived before it is computed.

        vLLM cuts back the request that was to load it and counts on it to compute the block. It
        leaves the block in its prefix cache all the while, and other requests that share it go on
        as if it were there; they read garbage if the first computes in several steps, or not at
        all because it is aborted (vllm 0.26 to 0.33, v1/core/sched/scheduler.py,
        _update_requests_with_invalid_blocks; vllm-project/vllm issue 49250).
        """
        suspects: set[int] = set(bad_block_ids)
        for state in self._requests.values():
            ids = state.block_ids
            idx = next((i for i, block_id in enumerate(ids) if block_id in bad_block_ids), None)
            if idx is None:
                continue
            suspects.update(ids[idx:])
            request = state.request
            request.num_computed_tokens = min(request.num_computed_tokens, idx * self._block_tokens)
            state.num_stored = min(state.num_stored, idx)
        if self._block_pool is not None:
            compat.forget(self._block_pool, suspects)

    def _discard_computing(self) -> None:
        """Give up stores whose blocks may be wrong; what is computed anew is planned anew."""
        while self._computing:
            _, job = self._computing.popleft()
            store = self._stores[job.job_id]
            store.state.num_stored = min(store.state.num_stored, store.first)
            self._give_back(job.job_id)

    def _finish_store(self, job_id: int, num_ranks: int) -> None:
        store = self._stores.get(job_id)
        if store is None:
            return
        store.num_ranks_left -= num_ranks
        if store.num_ranks_left <= 0:
            self._give_back(job_id)

    def _give_back(self, job_id: int) -> None:
        store = self._stores.pop(job_id)
        self._num_pinned -= len(store.blocks)
        # The tail of a prefix is reused before its head.
        compat.free(self._block_pool, reversed(store.blocks))

    def _finish_load(self, req_id: str, result: LoadResult) -> None:
        loads = self._loading.get(req_id)
        if not loads:
            return
        load = loads.popleft()
        if not loads:
            del self._loading[req_id]
        if result.corrupt_hashes:
            corrupt = [BlockHash(block_hash) for block_hash in result.corrupt_hashes]
            self._prefixes.report_corrupt(load.namespace, 0, corrupt)
        self._prefixes.release(
            [] if load.lease is None else [load.lease],
            num_loaded=result.num_loaded,
            num_failed=len(result.bad_blocks),
            load_us=result.load_us,
        )
        state = self._requests.get(req_id)
        if state is not None and result.bad_blocks:
            state.may_load = False
            # From the first bad block on, vLLM computes again, and what it computes is stored.
            state.num_stored = min(state.num_stored, load.first + result.bad_blocks[0])
            log.warning(
                "kvkeep: %d of %d blocks could not be loaded and are computed. request=%s",
                len(result.bad_blocks), load.num_blocks, req_id,
            )  # fmt: skip

    # ---- the end

    def finish_request(self, request: Any) -> dict[str, Any] | None:
        """A request ended, in whatever way; stores on their way go on.

        Returns:
            What its client is told for the engine that goes on with it; None for nothing.
        """
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return None
        self._drop_lease(state)
        if not (state.is_offered and compat.is_finished_well(request)):
            return None
        return self._handoffs.offer(request, state.hasher.hashes, state.num_stored) or None

    @property
    def has_stores_in_flight(self) -> bool:
        """Whether the engine must keep stepping so that blocks are given back."""
        return bool(self._stores)

    def reset(self) -> None:
        """Never load again what was stored so far by this engine, or for it.

        The pool is shared, so it is not wiped: this engine goes on under a namespace of its own.
        """
        self._num_resets += 1
        self._namespace = self._reset_namespace(self._num_resets)
        self._discard_computing()
        for job in self._computed:
            self._give_back(job.job_id)
        self._computed = []
        for state in self._requests.values():
            self._drop_lease(state)
            # Requests in flight neither load nor store under the old names.
            state.may_load = state.may_store = False

    def close(self) -> None:
        """End the session with the daemon."""
        self._prefixes.close()
