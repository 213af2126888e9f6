"""What the scheduler side knows of requests that run on a cartridge, and of cartridges on the way.

A cartridge's blocks lie in the pool like any others, under names that hold its digest. Where they
are missing, each rank makes its heads of them from the file (a *deposit*), and the request waits.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvkeep.cartridges.dispatch.salting import PREFIX, client_part
from kvkeep.cartridges.store.claims import FIELD, INSERTED, MODE, Asked, Claim
from kvkeep.cartridges.store.library import Checked
from kvkeep.connector import compat
from kvkeep.connector.metadata import DepositJob, DepositResult
from kvkeep.model.clock import Clock
from kvkeep.model.ids import BlockHash

SALT = PREFIX
"""How the salt of a request begins that runs on a cartridge, in the engine's own prefix cache."""
CLIENT_SALT = "kvkeep-client:"
"""Put before a client's own salt that looks like one of ours."""
DEPOSIT_WAIT_S = 300.0
"""A rank that has not said how a deposit went by then never will."""
TRIES_MAX = 8
"""Deposits for one request: the blocks of one may be evicted before it runs."""
PAUSE_MIN_S = 0.005
PAUSE_MAX_S = 0.5
"""Between two tries; twice as long each time."""


@dataclass(slots=True)
class Use:
    """One request's cartridge."""

    asked: Asked
    own_salt: str | None
    """What its client said; names what is behind the cartridge."""
    lookup: "Future[Checked]"
    checked: Checked | None = None
    """Set once it was found and the prompt goes with it."""
    claim: Claim = field(default_factory=lambda: Claim(0, is_strict=False))
    num_local_blocks: int = 0
    """Blocks that the engine had when it was last looked up."""
    refusal: str = ""
    """Why the request fails."""
    deposit: "Deposit | None" = None
    """The one that it waits for."""
    num_tries: int = 0
    ask_after_s: float = 0.0

    def pause(self, now_s: float) -> None:
        """Ask again a little later; each time a little later."""
        pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** max(0, self.num_tries - 2))
        self.ask_after_s = now_s + (pause_s if self.num_tries > 1 else 0.0)


@dataclass(slots=True)
class Deposit:
    """Blocks of a cartridge that the ranks bring to the pool."""

    begun_s: float
    num_ranks_left: int
    error: str = ""

    @property
    def is_open(self) -> bool:
        """Whether a rank has yet to say how it went."""
        return self.num_ranks_left > 0


class Deposits:
    """Deposits under way, one for each cartridge however many requests wait. Used by one thread."""

    def __init__(self, clock: Clock, num_ranks: int) -> None:
        self._clock = clock
        self._num_ranks = num_ranks
        self._ids = itertools.count(1)
        self._open: dict[int, Deposit] = {}
        self._by_last: dict[BlockHash, int] = {}
        """By the name of its last block, which no other list of blocks has."""
        self._jobs: list[DepositJob] = []

    def begin(self, checked: Checked, hashes: Sequence[BlockHash]) -> Deposit:
        """Have a cartridge's leading blocks brought under these names, unless they are coming."""
        job_id = self._by_last.get(hashes[-1])
        found = None if job_id is None else self._open.get(job_id)
        if found is not None and not self.is_overdue(found):
            return found
        job_id = next(self._ids)
        deposit = self._open[job_id] = Deposit(self._clock.now_s(), self._num_ranks)
        self._by_last[hashes[-1]] = job_id
        self._jobs.append(DepositJob(job_id, str(checked.path), checked.digest, b"".join(hashes)))
        return deposit

    def is_overdue(self, deposit: Deposit) -> bool:
        """Whether it is not waited for any longer."""
        return self._clock.now_s() - deposit.begun_s > DEPOSIT_WAIT_S

    def take_jobs(self) -> list[DepositJob]:
        """What the next step hands to the ranks."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def take_result(self, job_id: int, result: DepositResult) -> None:
        """What some ranks say of a deposit."""
        deposit = self._open.get(job_id)
        if deposit is None:
            return
        deposit.num_ranks_left -= result.num_ranks
        deposit.error = deposit.error or result.error
        if not deposit.is_open:
            del self._open[job_id]
            self._by_last = {h: other for h, other in self._by_last.items() if other != job_id}


def salt_of(digest: str, own_salt: str | None) -> str:
    """Under what a request's blocks lie in the engine's own prefix cache."""
    own = client_part(digest, own_salt)
    return f"{SALT}{digest}:{own}" if own else SALT + digest


def keep_apart(request: Any) -> None:
    """See to it that no client names a cartridge's blocks by a salt of its own making."""
    salt = request.cache_salt
    if salt and str(salt).startswith((SALT, CLIENT_SALT)):
        compat.salt(request, f"{CLIENT_SALT}{salt}")


def claim_to_fail(request: Any, block_tokens: int) -> int:
    """What to claim of a request about which nothing can be said, so that it can't go wrong.

    Its prompt may begin with tokens that stand for a cartridge's: those must not be computed.
    Claimed and not brought, the request fails. Any other is computed, which is always right.
    """
    params = request.kv_transfer_params
    if not isinstance(params, dict) or params.get(FIELD) is None:
        return 0
    is_text = params.get(MODE) == "replace" or not (params.get(MODE) or params.get(INSERTED))
    return 0 if is_text else max(0, min(block_tokens, request.num_tokens - 1))
