"""A rank brings cartridges to the pool: all blocks it names, or one sentence why not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvkeep.cartridges.file_format import read_head, write_cartridge
from kvkeep.connector.cartridges.depositor import NO_DAEMON, Bench, Depositor
from kvkeep.connector.metadata import DepositJob, DepositResult
from kvkeep.model.errors import UnavailableError
from tests.unit.cartridges.made import draft
from tests.unit.connector.cartridges.benches import document
from tests.unit.connector.worker.memories import BLOCK_TOKENS

NUM_BLOCKS = 5
HASHES = b"".join(bytes([idx]) * 32 for idx in range(1, NUM_BLOCKS + 1))


class Stored:
    """Batches as the store would take them."""

    def __init__(self, error: Exception | None = None) -> None:
        self.filled: list[tuple[int, int]] = []
        self.stored: list[tuple[bytes, list[int]]] = []
        self.lost: list[object] = []
        self._error = error

    def fill(self, _: Any, first: int, count: int) -> None:
        """See Scratch."""
        self.filled.append((first, count))

    def store(self, _: Any, __: Any, ___: bytes, hashes: bytes, ids: Any, ____: Any) -> None:
        """See Batches."""
        if self._error is not None:
            raise self._error
        self.stored.append((hashes, list(ids)))

    def attachment(self, *, is_there: bool = True) -> Any:
        """Of a rank."""
        link = SimpleNamespace(
            connection=object() if is_there else None,
            lost=lambda connection, error: self.lost.append(error),
        )
        return SimpleNamespace(link=link, pool=SimpleNamespace(is_proven=True))

    def bench(self) -> Bench:
        """Three blocks at once."""
        scratch: Any = SimpleNamespace(num_blocks=3, fill=self.fill)
        batches: Any = SimpleNamespace(store=self.store)
        return Bench(scratch, batches, lambda: None)


@pytest.fixture
def job(tmp_path: Path) -> DepositJob:
    """For all blocks of a cartridge."""
    path = tmp_path / "ships.safetensors"
    write_cartridge(path, draft("ships", block_tokens=BLOCK_TOKENS), document(NUM_BLOCKS))
    return DepositJob(7, str(path), read_head(path).digest, HASHES)


@contextmanager
def depositing(stored: Stored, *, is_there: bool = True) -> Iterator[Callable[..., Any]]:
    """Runs jobs to their end, and gives what was reported of them."""
    depositor = Depositor(stored.attachment(is_there=is_there), stored.bench)

    def run(*jobs: DepositJob) -> dict[int, DepositResult]:
        for each in jobs:
            depositor.submit(each, bytes(32))
        depositor.close()
        return depositor.poll()

    yield run


def test_all_blocks_are_stored(job: DepositJob) -> None:
    """A few at a time, each under its name; the job is reported once."""
    stored = Stored()
    with depositing(stored) as run:
        assert run(job) == {7: DepositResult(1)}

    assert stored.filled == [(0, 3), (3, 2)]
    assert stored.stored == [(HASHES[:96], [0, 1, 2]), (HASHES[96:], [0, 1])]


def test_without_a_daemon_nothing_is_read_into_pages(job: DepositJob) -> None:
    """The sentence says so."""
    stored = Stored()
    with depositing(stored, is_there=False) as run:
        assert run(job) == {7: DepositResult(1, NO_DAEMON)}
    assert stored.filled == []


def test_a_lost_daemon_ends_the_deposit(job: DepositJob) -> None:
    """Whoever keeps the connection is told; the next job is tried."""
    stored = Stored(UnavailableError("it is gone"))
    with depositing(stored) as run:
        second = DepositJob(8, job.path, job.digest, HASHES)
        found = run(job, second)
    assert {each.error for each in found.values()} == {"it is gone"}
    assert len(stored.lost) == 2


def test_a_damaged_file_is_not_used(job: DepositJob) -> None:
    """Not one block of it."""
    path = Path(job.path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    stored = Stored()

    with depositing(stored) as run:
        (result,) = run(job).values()

    assert "checksum" in result.error
    assert stored.stored == []
    assert stored.filled == []


def test_another_cartridge_at_its_place_is_not_used(job: DepositJob) -> None:
    """Its digest is not that which was asked for."""
    write_cartridge(
        Path(job.path), draft("ships", block_tokens=BLOCK_TOKENS), document(NUM_BLOCKS, seed=9)
    )
    stored = Stored()

    with depositing(stored) as run:
        (result,) = run(job).values()

    assert "another cartridge" in result.error
    assert stored.stored == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unforeseen_end_is_reported_too(job: DepositJob) -> None:
    """Every job is, or a request would wait for ever."""
    stored = Stored(ZeroDivisionError())
    with depositing(stored) as run:
        second = DepositJob(8, job.path, job.digest, HASHES)
        found = run(job, second)

    assert set(found) == {7, 8}
    assert all(each.error for each in found.values())
