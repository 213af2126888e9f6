"""The worker side hands stores to their thread, what another engine waits for first, and rests."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvkeep.connector.metadata import StepMetadata, StoreJob
from kvkeep.connector.worker.side import WorkerSide
from kvkeep.model.clock import SystemClock
from kvkeep.model.ids import Namespace

NAMESPACE = Namespace(b"n" * 32)
URGENT = StoreJob(1, bytes(32), (1,), is_urgent=True)
ORDINARY = StoreJob(2, bytes(32), (2,))


def side_of(*, is_writer: bool = True) -> WorkerSide:
    """A rank without a daemon: a job is over when its thread has seen that."""
    attachment: Any = SimpleNamespace(
        link=SimpleNamespace(connection=None), pool=None, close=lambda: None
    )
    mover: Any = SimpleNamespace(snapshot=lambda: None)
    memory: Any = SimpleNamespace(is_writer=is_writer)
    return WorkerSide(
        namespace=NAMESPACE,
        memory=memory,
        mover=mover,
        attachment=attachment,
        clock=SystemClock(),
        lease_s=30.0,
    )


class CountedRests:
    """A store thread that nobody has given a job."""

    num_rests = 0

    def rest(self) -> None:
        """See StoreThread."""
        self.num_rests += 1

    def poll(self) -> list[int]:
        """See StoreThread."""
        return []


def metadata_of(base_namespace: bytes = NAMESPACE) -> StepMetadata:
    """A step with a store of each kind."""
    return StepMetadata(NAMESPACE, base_namespace, 1, stores=[ORDINARY, URGENT])


def reported(side: WorkerSide) -> dict[int, int]:
    """Stores that are over when the thread has ended."""
    side.close()
    report = side.take_report()
    return {} if report is None else report.finished_stores


def test_urgent_stores_do_not_wait_for_the_forward_pass() -> None:
    """They are handed out at the begin of the step, the others are left for its end."""
    side, metadata = side_of(), metadata_of()

    assert side.store_urgent(metadata)
    assert metadata.stores == [ORDINARY]
    assert reported(side) == {1: 1}


def test_every_store_is_reported_once() -> None:
    """Whichever call handed it out."""
    side, metadata = side_of(), metadata_of()
    side.store_urgent(metadata)
    side.store_urgent(metadata)
    side.store(metadata)

    assert metadata.stores == []
    assert reported(side) == {1: 1, 2: 1}


def test_a_rank_that_may_not_store_leaves_urgent_ones_to_be_skipped() -> None:
    """One that derived another namespace, or that holds a copy of another's heads."""
    for side, metadata in (
        (side_of(), metadata_of(b"o" * 32)),
        (side_of(is_writer=False), metadata_of()),
    ):
        side.store_urgent(metadata)
        assert metadata.stores == [ORDINARY, URGENT]
        side.close()


@pytest.mark.parametrize("may_rest", [False, True])
def test_a_rank_rests_only_in_a_step_that_computes_nothing(
    monkeypatch: pytest.MonkeyPatch, may_rest: bool
) -> None:
    """Once a step, when everything else of it is done."""
    side, stores = side_of(), CountedRests()
    side.close()
    monkeypatch.setattr(side, "_stores", stores)
    side.load(StepMetadata(NAMESPACE, NAMESPACE, 1, may_rest=may_rest))
    assert stores.num_rests == 0

    side.take_report()

    assert stores.num_rests == may_rest
