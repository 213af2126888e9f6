"""What crosses between the connector's two halves, once per engine step.

Small and plain: vLLM pickles these itself, between its own processes.
"""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(slots=True)
class LoadJob:
    """Blocks to bring from the pool into the engine before this step's forward pass."""

    req_id: str
    hashes: bytes
    """32 bytes per block, in the order of the sequence."""
    slots: tuple[int, ...]
    """Pool slot of each block, under a read lease of the scheduler's session."""
    block_ids: tuple[int, ...]
    """Engine block that each goes to."""
    generation: int = 0
    """Of the daemon that lent the slots; a rank that has met another one declines. 0: any."""


@dataclass(slots=True)
class StoreJob:
    """Blocks to be copied to the pool; all ranks have computed them well."""

    job_id: int
    hashes: bytes
    block_ids: tuple[int, ...]
    """Held by a reference of the scheduler side until every rank has reported the job."""
    is_urgent: bool = False
    """Another engine waits for the blocks: copied beside this step's forward pass, not after it."""


@dataclass(slots=True)
class DepositJob:
    """Leading blocks of a cartridge that every rank brings to the pool, its heads of them."""

    job_id: int
    path: str
    """Of its file."""
    digest: str
    """Of its manifest; a file with another is not used."""
    hashes: bytes
    """Names of the blocks, from the first on."""


@dataclass(slots=True)
class DepositResult:
    """How a deposit went on some ranks."""

    num_ranks: int
    error: str = ""
    """Why it did not, in words."""


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):
    """From the scheduler side to every rank."""

    namespace: bytes
    """Of every block named here."""
    base_namespace: bytes
    """Before resets; a rank that derived another one for itself refuses the step."""
    step: int
    """Counts up; reports name it."""
    is_awaited: bool = False
    """Whether blocks computed in this step wait for its report before they are stored."""
    may_rest: bool = False
    """Nothing is computed in this step, and blocks are waited for, here or elsewhere: ranks leave
    their cores to others, for a moment."""
    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreJob] = field(default_factory=list)
    """Blocks of earlier steps."""
    deposits: list[DepositJob] = field(default_factory=list)
    """Cartridges that requests wait for."""


@dataclass(slots=True)
class LoadResult:
    """How one rank's load ended."""

    num_loaded: int
    bad_blocks: list[int]
    """Positions in the job of blocks that did not arrive."""
    corrupt_hashes: list[bytes]
    """Blocks whose bytes did not match their digests."""
    load_us: int


@dataclass(slots=True)
class StepReport(KVConnectorWorkerMetadata):
    """From the ranks to the scheduler side; merged over ranks by ``aggregate``."""

    step: int = 0
    """The step that has ended; one report holds all ranks' of the same step."""
    loads: dict[str, LoadResult] = field(default_factory=dict)
    """By request id; a block counts as loaded only if every rank loaded it."""
    finished_stores: dict[int, int] = field(default_factory=dict)
    """Job id to the number of ranks that are done with its blocks."""
    deposits: dict[int, DepositResult] = field(default_factory=dict)
    """By job id; of the ranks that are done with it."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReport":
        """Merge another rank's report into this one."""
        assert isinstance(other, StepReport)
        self.step = max(self.step, other.step)
        for job_id, num_ranks in other.finished_stores.items():
            self.finished_stores[job_id] = self.finished_stores.get(job_id, 0) + num_ranks
        for job_id, deposit in other.deposits.items():
            known = self.deposits.get(job_id)
            self.deposits[job_id] = deposit if known is None else _join(known, deposit)
        for req_id, result in other.loads.items():
            mine = self.loads.get(req_id)
            self.loads[req_id] = result if mine is None else _merge(mine, result)
        return self


def _join(mine: DepositResult, other: DepositResult) -> DepositResult:
    return DepositResult(mine.num_ranks + other.num_ranks, mine.error or other.error)


def _merge(mine: LoadResult, other: LoadResult) -> LoadResult:
    bad = sorted({*mine.bad_blocks, *other.bad_blocks})
    num_blocks = mine.num_loaded + len(mine.bad_blocks)
    return LoadResult(
        num_loaded=num_blocks - len(bad),
        bad_blocks=bad,
        corrupt_hashes=[*mine.corrupt_hashes, *other.corrupt_hashes],
        load_us=max(mine.load_us, other.load_us),
    )
