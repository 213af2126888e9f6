"""An engine's scheduler reduced to its calls of the connector, and a daemon reduced to answers.

Requests, block pool and scheduler output are vLLM's own.
"""

import itertools
from collections.abc import Sequence
from typing import Any, cast

from vllm import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from kvkeep.client.prefixes import Answer, PrefixClient, PrefixLease, Question
from kvkeep.connector.metadata import LoadResult, StepMetadata, StepReport
from kvkeep.connector.scheduler_side import SchedulerSide
from kvkeep.connector.settings import ConnectorSettings
from kvkeep.model.ids import BlockHash, Namespace

BLOCK_TOKENS = 16
NAMESPACE = Namespace(b"n" * 32)


class ManualClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.s = 100.0

    def now_s(self) -> float:
        """Seconds so far."""
        return self.s


class FakePrefixes:
    """What a daemon would lend: ``slots`` by namespace and block hash."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self._ids = itertools.count(1)
        self.is_connected = True
        self.is_pending = False
        self.lease_s = 30.0
        self.slots: dict[tuple[Namespace, BlockHash], int] = {}
        self.asked: list[list[BlockHash]] = []
        self.waits_s: list[float] = []
        self.open: dict[int, tuple[Namespace, list[BlockHash]]] = {}
        self.leases: dict[int, PrefixLease] = {}
        self.released: list[dict[str, int]] = []
        self.corrupt: list[tuple[Namespace, list[BlockHash]]] = []
        self.handoffs: list[tuple[str, int, int]] = []

    def hold(self, hashes: Sequence[BlockHash], namespace: Namespace = NAMESPACE) -> None:
        """Have these blocks in the pool, in slots 100 and up."""
        for block_hash in hashes:
            self.slots[namespace, block_hash] = 100 + len(self.slots)

    def ask(
        self,
        namespace: Namespace,
        _: int,
        hashes: Sequence[BlockHash],
        prefill_tokens_s: int = 0,
        engine_request: str | None = None,
    ) -> Question | None:
        """See PrefixClient."""
        if not self.is_connected:
            return None
        question = Question(next(self._ids), self._clock.s, cast(Any, None), self.lease_s)
        self.asked.append(list(hashes))
        self.open[question.request_id] = (namespace, list(hashes))
        return question

    def answer(self, question: Question, wait_s: float) -> PrefixLease | Answer:
        """See PrefixClient."""
        self.waits_s.append(wait_s)
        if not self.is_connected:
            return Answer.NOTHING
        if self.is_pending:
            self._clock.s += wait_s
            return Answer.PENDING
        namespace, hashes = self.open.pop(question.request_id)
        found = [self.slots.get((namespace, block_hash)) for block_hash in hashes]
        slots = tuple(itertools.takewhile(lambda slot: slot is not None, found))
        if not slots:
            return Answer.NOTHING
        deadline_s = question.asked_s + self.lease_s
        lease = PrefixLease(
            question.request_id, cast(Any, slots), deadline_s, cast(Any, None), 0, question.lease_s
        )
        self.leases[lease.lease_id] = lease
        return lease

    def forget(self, question: Question) -> None:
        """See PrefixClient."""
        del self.open[question.request_id]

    def release(self, leases: Sequence[PrefixLease], **report: int) -> None:
        """See PrefixClient; a lease that is given back twice is an error."""
        for lease in leases:
            del self.leases[lease.lease_id]
        self.released.append(report)

    def report_corrupt(self, namespace: Namespace, _: int, hashes: Sequence[BlockHash]) -> None:
        """See PrefixClient."""
        self.corrupt.append((namespace, list(hashes)))

    def report_handoff(self, outcome: str, num_missed: int, wait_us: int) -> None:
        """See PrefixClient."""
        self.handoffs.append((outcome, num_missed, wait_us))

    def close(self) -> None:
        """See PrefixClient."""
        self.is_connected = False


def make_request(req_id: str = "r", num_tokens: int = 80, **more: Any) -> Request:
    """A request whose tokens count up from 0."""
    parameters = more.pop("sampling_params", SamplingParams(max_tokens=64))
    return Request(req_id, list(range(num_tokens)), parameters, None, **more)


class Engine:
    """Calls a scheduler side in vLLM's order (vllm 0.32, v1/core/sched/scheduler.py)."""

    def __init__(
        self,
        *,
        num_blocks: int = 65,
        num_ranks: int = 1,
        prefixes: Any = None,
        clock: ManualClock | None = None,
        **settings: Any,
    ) -> None:
        self.clock = clock or ManualClock()
        self.fake = FakePrefixes(self.clock)
        self.pool = BlockPool(num_blocks, True, BLOCK_TOKENS)
        self.tables: dict[str, list[Any]] = {}
        self.side = SchedulerSide(
            namespace=NAMESPACE,
            block_tokens=BLOCK_TOKENS,
            num_ranks=num_ranks,
            settings=ConnectorSettings(socket="unused", **settings),
            prefixes=cast(PrefixClient, prefixes or self.fake),
            clock=self.clock,
            reset_namespace=lambda number: Namespace(bytes([number]) * 32),
        )
        self.side.bind_block_pool(self.pool)

    @property
    def num_held(self) -> int:
        """Blocks with a reference, the null block apart."""
        return int(self.pool.num_gpu_blocks - self.pool.get_num_free_blocks() - 1)

    def blocks(self, request: Request) -> list[int]:
        """A request's block ids."""
        return [block.block_id for block in self.tables[request.request_id]]

    def arrive(self, request: Request) -> Request:
        """A request joins the waiting queue."""
        self.side.add_request(request)
        return request

    def admit(
        self,
        request: Request,
        *,
        local: Sequence[Any] = (),
        num_external: int | None = None,
    ) -> int | None:
        """Schedule a waiting request for the first time, or again.

        Args:
            request: Asked about, then given blocks for all its tokens.
            local: Blocks that vLLM's own prefix cache has.
            num_external: Tokens to load where vLLM takes fewer than were offered.

        Returns:
            What the connector offered; None if it wants to be asked again.
        """
        num_local = len(local) * BLOCK_TOKENS
        offered = self.side.match(request, num_local)
        if offered is None:
            return None
        taken = offered if num_external is None else num_external
        self.pool.touch(list(local))
        num_new = -(-request.num_tokens // BLOCK_TOKENS) - len(local)
        table = [*local, *self.pool.get_new_blocks(num_new)]
        self.tables[request.request_id] = table
        assert self.side.allocated(request, KVCacheBlocks((table,)), taken)
        request.num_computed_tokens = num_local + taken
        return offered

    def step(self, *scheduled: tuple[Request, int]) -> StepMetadata:
        """Plan a step that computes so many tokens of each; all count as admitted in it."""
        output = SchedulerOutput.make_empty()
        for request, num_tokens in scheduled:
            ids = self.blocks(request)
            output.scheduled_new_reqs.append(NewRequestData.from_request(request, (ids,)))
            output.num_scheduled_tokens[request.request_id] = num_tokens
        metadata = self.side.build_metadata()
        assert self.side.plan_stores(output, metadata)
        for request, num_tokens in scheduled:
            request.num_computed_tokens += num_tokens
        return metadata

    def end(self, metadata: StepMetadata, *, num_ranks: int = 1) -> None:
        """The step's report: everything landed, every store it was handed is done."""
        report = StepReport(metadata.step)
        for load in metadata.loads:
            report.loads[load.req_id] = LoadResult(len(load.slots), [], [], 7)
        for job in metadata.stores:
            report.finished_stores[job.job_id] = num_ranks
        self.side.take_report(report, set())

    def fail(self, metadata: StepMetadata, bad: Sequence[int], corrupt: Sequence[int] = ()) -> None:
        """The step's report: these blocks of its only load did not arrive."""
        (load,) = metadata.loads
        result = LoadResult(
            len(load.slots) - len(bad),
            list(bad),
            [load.hashes[32 * idx : 32 * (idx + 1)] for idx in corrupt],
            7,
        )
        report = StepReport(metadata.step, {load.req_id: result})
        self.side.take_report(report, {load.block_ids[idx] for idx in bad})

    def free(self, request: Request) -> None:
        """VLLM takes the request's blocks away: it was preempted, or ended."""
        self.pool.free_blocks(reversed(self.tables.pop(request.request_id)))
        request.num_computed_tokens = 0

    def finish(
        self, request: Request, status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED
    ) -> dict[str, Any] | None:
        """The request ended; vLLM tells before it frees the blocks.

        Returns:
            What its client is told.
        """
        request.status = status
        answer = self.side.finish_request(request)
        if request.request_id in self.tables:
            self.free(request)
        return answer

    def is_idle(self) -> bool:
        """Whether nothing is left of any request: no lease, no question, no block, no state."""
        side = self.side
        state = (side._requests, side._loading, side._stores, side._loads, side._computing)
        nothing = not any((*state, side._computed, side._num_pinned, side.has_stores_in_flight))
        return nothing and not self.fake.leases and not self.fake.open and not self.num_held
