"""The plug-in itself: whatever goes wrong in a hook becomes a miss, and what is held is let go."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
import torch
import vllm.distributed.kv_transfer.kv_connector.v1.base as base
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from kvkeep.connector.metadata import LoadJob, StepMetadata, StepReport, StoreJob
from kvkeep.connector.plugin import FAILURES_MAX, KvkeepConnector
from kvkeep.connector.worker.side import IdleWorkerSide
from kvkeep.core.effects import NO_SLOT
from kvkeep.model.errors import InputError, InvariantError
from tests.unit.connector.configs import make_cache_config, make_config, make_weights
from tests.unit.connector.engines import Engine, make_request

SCHEDULER_HOOKS = [
    "add_request",
    "match",
    "allocated",
    "plan_stores",
    "take_report",
    "finish_request",
    "reset",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """An engine's configuration."""
    return make_config(make_weights(tmp_path / "model"))


@pytest.fixture
def connector(config: Any) -> KvkeepConnector:
    """A worker's half, which needs no daemon to be made."""
    return KvkeepConnector(config, base.KVConnectorRole.WORKER, make_cache_config())


@pytest.fixture
def engine(connector: KvkeepConnector) -> Engine:
    """A scheduler side whose hooks are reached through the plug-in."""
    engine = Engine()
    connector._scheduler = engine.side
    return engine


def broken(error: Exception | None = None) -> Any:
    """Something that fails when it is called."""

    def fail(*_: object, **__: object) -> Any:
        raise error or ZeroDivisionError

    return fail


def output(bad: set[int] | None = None, report: StepReport | None = None) -> KVConnectorOutput:
    """What a step gave."""
    return KVConnectorOutput(invalid_block_ids=bad or set(), kv_connector_worker_meta=report)


def run_hooks(connector: KvkeepConnector, request: Any) -> StepMetadata:
    """One request's life, as vLLM drives it; gives the metadata of its step."""
    connector.on_new_request(request)
    claim, is_async = connector.get_num_new_matched_tokens(request, 0)
    assert not is_async
    table = list(connector._scheduler._block_pool.get_new_blocks(5))  # type: ignore[union-attr]
    connector.update_state_after_alloc(request, KVCacheBlocks((table,)), claim or 0)
    metadata = connector.build_connector_meta(SchedulerOutput.make_empty())
    connector.update_connector_output(output(report=StepReport(metadata.step)))
    assert connector.request_finished(request, []) == (False, None)
    return metadata


# ---- exceptions


@pytest.mark.parametrize("hook", SCHEDULER_HOOKS)
def test_an_exception_in_the_scheduler_is_a_miss(
    connector: KvkeepConnector,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hook: str,
) -> None:
    """Whichever hook fails, vLLM notices nothing; the failure is counted and logged."""
    monkeypatch.setattr(engine.side, hook, broken())
    run_hooks(connector, make_request())
    connector.reset_cache()

    assert connector._num_exceptions >= 1
    assert "ZeroDivisionError" in caplog.text


def test_a_promised_load_that_cannot_be_planned_fails_as_a_load(
    connector: KvkeepConnector, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM counts on the tokens, so the ranks are told to decline just those blocks."""
    request = make_request()
    connector.on_new_request(request)
    monkeypatch.setattr(engine.side, "allocated", broken())
    table = engine.pool.get_new_blocks(5)
    connector.update_state_after_alloc(request, KVCacheBlocks((table,)), 48)

    (load,) = connector.build_connector_meta(SchedulerOutput.make_empty()).loads
    assert load.block_ids == tuple(block.block_id for block in table[:3])
    assert set(load.slots) == {NO_SLOT}


def test_a_failed_plan_of_stores_ends_storing_for_requests_in_flight(
    connector: KvkeepConnector, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the failed step scheduled is not known, so later block ids would be misplaced."""
    request = engine.arrive(make_request())
    engine.admit(request)
    with monkeypatch.context() as patch:
        patch.setattr(engine.side, "plan_stores", broken())
        connector.build_connector_meta(SchedulerOutput.make_empty())

    assert not engine.step((request, 80)).is_awaited


def test_a_failed_reset_is_told(
    connector: KvkeepConnector, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM must not believe that old KV is out of reach when it is not."""
    assert connector.reset_cache() is True
    monkeypatch.setattr(engine.side, "reset", broken())

    assert connector.reset_cache() is False


@pytest.mark.parametrize("is_contradiction", [False, True])
def test_too_many_exceptions_switch_off_but_let_go(
    connector: KvkeepConnector,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    is_contradiction: bool,
) -> None:
    """Kvkeep then begins nothing any more, and still gives back what it holds."""
    request = engine.arrive(make_request())
    engine.admit(request)
    engine.end(engine.step((request, 80)))
    metadata = connector.build_connector_meta(SchedulerOutput.make_empty())
    with monkeypatch.context() as patch:
        patch.setattr(engine.side, "add_request", broken(InvariantError("x")))
        connector.on_new_request(make_request("contradiction"))
    if not is_contradiction:
        connector._num_exceptions = FAILURES_MAX

    late = make_request("late")
    connector.on_new_request(late)
    assert connector.get_num_new_matched_tokens(late, 0) == (0, False)
    assert "late" not in engine.side._requests
    done = {job.job_id: 1 for job in metadata.stores}
    connector.update_connector_output(output(report=StepReport(2, finished_stores=done)))
    connector.request_finished(request, [])
    engine.free(request)
    assert not connector.has_pending_push_work()
    assert engine.is_idle()


# ---- the worker's half


class BrokenWorker(IdleWorkerSide):
    """Fails whatever it is asked."""

    load = store = broken()


class UrgentWorker(IdleWorkerSide):
    """Notes the steps whose urgent stores it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def store_urgent(self, metadata: StepMetadata) -> bool:
        """See WorkerSide."""
        self.steps.append(metadata.step)
        return True


def test_stores_that_are_waited_for_are_handed_out_first(connector: KvkeepConnector) -> None:
    """Before the forward pass; metadata of another connector is none of ours."""
    connector._worker = worker = UrgentWorker()
    connector.handle_preemptions(StepMetadata(b"n" * 32, b"n" * 32, 3))
    connector.handle_preemptions(base.KVConnectorMetadata())

    assert worker.steps == [3]


def test_an_exception_in_a_rank_fails_its_loads_and_ends_its_stores(
    connector: KvkeepConnector,
) -> None:
    """Every block is reported bad and every store over, so that vLLM goes on."""
    connector._worker = BrokenWorker()
    metadata = StepMetadata(b"n" * 32, b"n" * 32, 3)
    metadata.loads = [LoadJob("r", bytes(64), (1, 2), (5, 6))]
    metadata.stores = [StoreJob(9, bytes(32), (7,))]
    connector.bind_connector_metadata(metadata)
    connector.start_load_kv(None)
    connector.wait_for_save()

    report = connector.build_connector_worker_meta()
    assert connector.get_block_ids_with_load_errors() == {5, 6}
    assert report is not None
    assert (report.step, report.finished_stores) == (3, {9: 1})
    assert report.loads["r"].bad_blocks == [0, 1]


def test_a_rank_without_memory_declines_everything_once() -> None:
    """An idle rank fails each load and ends each store once, though it is called twice a step."""
    side = IdleWorkerSide()
    metadata = StepMetadata(b"", b"", 4, is_awaited=True)
    metadata.loads = [LoadJob("r", bytes(32), (1,), (5,))]
    metadata.stores = [StoreJob(9, bytes(32), (7,))]
    for _ in range(2):
        side.load(metadata)
        side.store(metadata)

    assert side.take_bad_block_ids() == {5}
    assert side.take_bad_block_ids() == set()
    report = side.take_report()
    assert report is not None
    assert (list(report.loads), report.finished_stores, report.step) == (["r"], {9: 1}, 4)
    side.load(StepMetadata(b"", b"", 5))
    assert side.take_report() is None


# ---- beginnings


def test_an_unsupported_engine_runs_as_if_without_kvkeep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kvkeep says why it is off; both halves then do nothing."""
    config = make_config(make_weights(tmp_path / "model"), pp_size=2)
    scheduler, worker = (
        KvkeepConnector(config, role, make_cache_config())
        for role in (base.KVConnectorRole.SCHEDULER, base.KVConnectorRole.WORKER)
    )
    request = make_request()
    scheduler.on_new_request(request)
    worker.register_kv_caches({})
    worker.bind_connector_metadata(scheduler.build_connector_meta(SchedulerOutput.make_empty()))
    worker.start_load_kv(None)
    worker.wait_for_save()

    assert "switched off" in caplog.text
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert not scheduler.has_pending_push_work()
    assert worker.build_connector_worker_meta() is None
    assert scheduler.reset_cache() is True


def test_tensors_that_are_not_head_major_switch_a_rank_off(
    connector: KvkeepConnector, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank whose memory is laid out otherwise declines, and says what to unset."""
    tensors = {f"layers.{i}": torch.zeros(8, 16, 2, 64).transpose(1, 2) for i in range(3)}
    connector.register_kv_caches(tensors)

    assert "unset VLLM_KV_CACHE_LAYOUT" in caplog.text
    assert isinstance(connector._worker, IdleWorkerSide)


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "fail"},
        {"extra": {"socket": "s", "no": 1}},
        {"extra": {"socket": "s", "kv_form": "int8"}, "cache_dtype": "fp8_e4m3"},
    ],
)
def test_a_wrong_configuration_stops_the_engine(tmp_path: Path, changes: dict[str, Any]) -> None:
    """What the user wrote wrong is an error at start, not a warning in a log."""
    config = make_config(make_weights(tmp_path / "model"), **changes)

    with pytest.raises(InputError):
        KvkeepConnector(config, base.KVConnectorRole.WORKER, make_cache_config())


def test_a_form_that_a_memory_does_not_have_stops_the_engine(tmp_path: Path) -> None:
    """Blocks of a GPU are stored to the bit or not at all; the sentence names the setting."""
    extra = {"socket": "s", "kv_form": "int8"}
    config = make_config(make_weights(tmp_path / "model"), extra=extra)
    connector = KvkeepConnector(config, base.KVConnectorRole.WORKER, make_cache_config())
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))

    with pytest.raises(InputError, match=r"kv_form int8 .* lies on cuda: leave kv_form out"):
        connector._make_mover(on_gpu)


def test_the_head_major_layout_is_asked_for(config: Any) -> None:
    """The string is the one this vLLM understands, the same that its own connectors give."""
    assert KvkeepConnector.get_required_kvcache_layout(config) == "LBHNC"


def test_a_foreign_report_is_no_report(connector: KvkeepConnector, engine: Engine) -> None:
    """In a MultiConnector other children's reports may pass by; they say nothing to kvkeep."""
    foreign: Any = SimpleNamespace()
    connector.update_connector_output(output(report=foreign))

    assert connector._num_exceptions == 0
