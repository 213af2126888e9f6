"""An engine that serves cartridges, with a library that answers when a test says so."""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np

from kvkeep.cartridges.store.library import Checked, Library
from kvkeep.client.prefixes import PrefixClient
from kvkeep.connector.cartridges.serving_side import ServingSide
from kvkeep.connector.metadata import DepositJob, DepositResult, StepMetadata, StepReport
from kvkeep.connector.settings import ConnectorSettings
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import BlockHash, Namespace
from tests.unit.cartridges.made import small_manifest
from tests.unit.connector.engines import (
    BLOCK_TOKENS,
    NAMESPACE,
    Engine,
    FakePrefixes,
    ManualClock,
    make_request,
)

DIGEST = "d" * 64


def checked(
    cartridge_id: str = "ships",
    *,
    num_tokens: int = 64,
    has_ids: bool = True,
    is_pinned: bool = False,
    digest: str = DIGEST,
) -> Checked:
    """A cartridge whose tokens count up from 0, as those of ``make_request``."""
    manifest = small_manifest(num_tokens, BLOCK_TOKENS, cartridge_id, has_token_ids=has_ids)
    ids = np.arange(num_tokens, dtype=np.int32) if has_ids else None
    return Checked(Path(f"{digest}.safetensors"), digest, manifest, ids, is_pinned)


class FakeLibrary:
    """Cartridges by id; an error is raised, and what is not there is being read."""

    def __init__(self) -> None:
        self.found: dict[str, Checked | Exception] = {"ships": checked()}
        self.open: list[tuple[str, Future[Checked]]] = []

    def look_up(self, cartridge_id: str) -> "Future[Checked]":
        """See Library."""
        future: Future[Checked] = Future()
        self.open.append((cartridge_id, future))
        if cartridge_id in self.found:
            self.answer(cartridge_id)
        return future

    def answer(self, cartridge_id: str) -> None:
        """The file was read."""
        for each, future in self.open:
            if each == cartridge_id and not future.done():
                found = self.found[cartridge_id]
                if isinstance(found, Exception):
                    future.set_exception(found)
                else:
                    future.set_result(found)

    def close(self) -> None:
        """See Library."""


class KeepingPrefixes(FakePrefixes):
    """A daemon that is told of cartridges."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.session: object = "first"
        self.kept: list[tuple[str, int, bool]] = []

    def keep_cartridge(
        self,
        cartridge_id: str,
        _: str,
        __: Namespace,
        hashes: Sequence[BlockHash],
        *,
        is_pinned: bool,
    ) -> None:
        """See PrefixClient."""
        self.kept.append((cartridge_id, len(hashes), is_pinned))


class ServingEngine(Engine):
    """Calls a serving side as vLLM does."""

    def __init__(self, *, num_ranks: int = 1, cartridges: bool = True, **settings: Any) -> None:
        clock = ManualClock()
        super().__init__(clock=clock)
        self.fake: KeepingPrefixes = KeepingPrefixes(clock)
        self.library = FakeLibrary()
        settings.setdefault("cartridge_library", "/nowhere")
        self.serving = ServingSide(
            library=cast(Library, self.library),
            namespace=NAMESPACE,
            block_tokens=BLOCK_TOKENS,
            num_ranks=num_ranks,
            settings=ConnectorSettings(socket="unused", cartridges=cartridges, **settings),
            prefixes=cast(PrefixClient, self.fake),
            clock=clock,
            reset_namespace=lambda number: Namespace(bytes([number]) * 32),
        )
        self.side = self.serving
        self.side.bind_block_pool(self.pool)

    def ask(self, req_id: str = "r", *, num_tokens: int = 80, salt: str | None = None,
            **params: Any) -> Any:  # fmt: skip
        """A request for a cartridge arrives."""
        params = {"cartridge_id": "ships", **params}
        request = make_request(req_id, num_tokens, cache_salt=salt)
        request.kv_transfer_params = params
        return self.arrive(request)

    def idle_step(self) -> StepMetadata:
        """A step with nothing to compute, as while requests wait."""
        return self.step()

    def deposited(
        self, *jobs: DepositJob, error: str = "", num_ranks: int = 1, holds: bool = True
    ) -> None:
        """Ranks report deposits; the pool has their blocks."""
        report = StepReport(1)
        for job in jobs:
            if holds and not error:
                step = range(0, len(job.hashes), 32)
                self.fake.hold([BlockHash(job.hashes[idx : idx + 32]) for idx in step])
            report.deposits[job.job_id] = DepositResult(num_ranks, error)
        self.side.take_report(report, set())


def cartridge_hashes(num_blocks: int, digest: str = DIGEST, **extras: str) -> list[BlockHash]:
    """Names of the leading blocks of ``make_request``'s tokens, of a cartridge."""
    hasher = BlockHasher(NAMESPACE, BLOCK_TOKENS, extras={"cartridge": digest, **extras})
    return list(hasher.extend(list(range(num_blocks * BLOCK_TOKENS))))
