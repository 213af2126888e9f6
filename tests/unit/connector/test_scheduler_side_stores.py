"""The scheduler side's stores: which blocks, when, how long held, and what discards them."""

from pathlib import Path
from typing import Any

import platformdirs
import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId

from kvkeep.connector import scheduler_side
from kvkeep.connector.lora import lora_identity
from kvkeep.connector.metadata import LoadResult, StepReport
from kvkeep.model.hashing import BlockHasher
from tests.unit.connector.engines import BLOCK_TOKENS, NAMESPACE, Engine, make_request


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path_factory.mktemp("c")))


def hashes_of(num_blocks: int) -> list[Any]:
    """Hashes of the blocks of ``make_request``'s tokens."""
    hasher = BlockHasher(NAMESPACE, BLOCK_TOKENS)
    return list(hasher.extend(list(range(num_blocks * BLOCK_TOKENS))))


def job_blocks(metadata: Any) -> list[tuple[int, ...]]:
    """Engine blocks of the stores that a step hands out."""
    return [job.block_ids for job in metadata.stores]


def test_blocks_are_stored_when_their_step_has_ended() -> None:
    """A step's full blocks are handed out with the next step, the half-full tail never."""
    engine = Engine()
    request = engine.arrive(make_request(num_tokens=72))
    engine.admit(request)
    first = engine.step((request, 72))
    assert (first.stores, first.is_awaited) == ([], True)
    engine.end(first)

    (job,) = engine.step((request, 1)).stores
    assert list(job.block_ids) == engine.blocks(request)[:4]
    assert job.hashes == b"".join(hashes_of(4))


def with_adapter(folder: Path) -> LoRARequest:
    """An adapter in this folder."""
    (folder / "adapter_model.safetensors").write_bytes(b"first weights")
    (folder / "adapter_config.json").write_bytes(b"{}")
    return LoRARequest("adapter", 1, str(folder))


@pytest.mark.parametrize("is_replaced", [False, True])
def test_nothing_is_stored_of_an_adapter_whose_files_changed(
    tmp_path: Path, is_replaced: bool
) -> None:
    """The engine may have read them again, under a request that was named before."""
    engine = Engine()
    adapter = with_adapter(tmp_path)
    request = engine.arrive(make_request(num_tokens=72, lora_request=adapter))
    engine.admit(request)
    if is_replaced:
        (tmp_path / "adapter_model.safetensors").write_bytes(b"other weights")

    assert engine.step((request, 72)).is_awaited is not is_replaced


def test_nothing_is_loaded_of_an_adapter_whose_files_changed(tmp_path: Path) -> None:
    """What was asked for under the old weights is given back, and computed with the new ones."""
    engine = Engine()
    adapter = with_adapter(tmp_path)
    hasher = BlockHasher(NAMESPACE, BLOCK_TOKENS, extras={"lora": lora_identity(adapter)})
    engine.fake.hold(list(hasher.extend(list(range(64)))))
    one, two = (engine.arrive(make_request(name, lora_request=adapter)) for name in "ab")
    assert engine.side.match(one, 0) == 64
    (tmp_path / "adapter_model.safetensors").write_bytes(b"other weights")

    assert engine.side.match(one, 0) == engine.side.match(two, 0) == 0
    engine.finish(one)
    engine.finish(two)
    assert engine.is_idle()


def test_blocks_are_stored_chunk_by_chunk_and_once() -> None:
    """A prompt computed in chunks is stored as far as each chunk completed blocks."""
    engine = Engine()
    request = engine.arrive(make_request(num_tokens=80))
    engine.admit(request)
    handed = []
    for num_tokens in (40, 24, 16, 1, 1):
        metadata = engine.step((request, num_tokens))
        handed += job_blocks(metadata)
        engine.end(metadata)

    ids = engine.blocks(request)
    assert handed == [tuple(ids[:2]), tuple(ids[2:4]), tuple(ids[4:5])]


def test_generated_tokens_are_stored_when_they_are_known() -> None:
    """A block is hashed over tokens that are final; a token being guessed is not among them."""
    engine = Engine()
    request = engine.arrive(make_request(num_tokens=79))
    engine.admit(request)
    engine.tables["r"] += engine.pool.get_new_blocks(1)
    engine.end(engine.step((request, 79)))
    guessed = engine.step((request, 1))
    assert len(guessed.stores) == 1
    assert not guessed.is_awaited
    request.append_output_token_ids(7)
    engine.end(guessed)

    metadata = engine.step((request, 1))
    engine.end(metadata)
    (job,) = engine.step().stores
    assert list(job.block_ids) == engine.blocks(request)[4:5]


def test_what_the_pool_holds_is_not_stored_again() -> None:
    """A loaded prefix, and one that the engine had while the pool did too, is left alone."""
    engine = Engine()
    engine.fake.hold(hashes_of(3))
    request = engine.arrive(make_request())
    engine.admit(request)
    engine.end(engine.step((request, 32)))

    (job,) = engine.step().stores
    assert list(job.block_ids) == engine.blocks(request)[3:5]


def test_nothing_is_stored_when_told_not_to() -> None:
    """With ``store: false`` no block is held."""
    engine = Engine(store=False)
    request = engine.arrive(make_request())
    engine.admit(request)

    assert not engine.step((request, 80)).is_awaited


# ---- holding blocks


def test_blocks_are_held_until_every_rank_has_reported() -> None:
    """The first rank's report frees nothing; the last one's frees each block once."""
    engine = Engine(num_ranks=3)
    request = engine.arrive(make_request())
    engine.admit(request)
    engine.end(engine.step((request, 80)))
    (job,) = engine.step().stores
    engine.finish(request)
    for num_ranks in (1, 1):
        report = StepReport(2, finished_stores={job.job_id: num_ranks})
        engine.side.take_report(report, set())
        assert engine.num_held == 5
        assert engine.side.has_stores_in_flight
    engine.side.take_report(StepReport(3, finished_stores={job.job_id: 1}), set())

    assert engine.is_idle()


def test_reports_of_ranks_add_up() -> None:
    """Merged reports count ranks per store, and a block landed only if it did everywhere."""
    one = StepReport(5, {"r": LoadResult(3, [1], [b"x"], 10)}, {1: 1, 2: 1})
    other = StepReport(5, {"r": LoadResult(2, [1, 3], [b"y"], 20)}, {2: 1})

    merged = one.aggregate(other)
    assert merged.finished_stores == {1: 1, 2: 2}
    assert merged.loads == {"r": LoadResult(2, [1, 3], [b"x", b"y"], 20)}
    assert merged.step == 5


def test_a_report_of_an_unknown_store_changes_nothing() -> None:
    """A job that was never given out, or is over, frees no block of anybody."""
    engine = Engine()
    request = engine.arrive(make_request())
    engine.admit(request)
    engine.end(engine.step((request, 80)))
    metadata = engine.step()
    engine.side.take_report(StepReport(1, finished_stores={99: 1}), set())
    engine.end(metadata)
    engine.end(metadata)

    assert engine.num_held == len(engine.blocks(request))


def test_held_blocks_survive_a_preemption() -> None:
    """What is being stored stays as it is when vLLM takes the request's blocks away."""
    engine = Engine(num_blocks=21)
    request = engine.arrive(make_request())
    engine.admit(request)
    stored = engine.blocks(request)
    engine.end(engine.step((request, 80)))
    metadata = engine.step()
    engine.free(request)

    others = [block.block_id for block in engine.pool.get_new_blocks(15)]
    assert not set(others) & set(stored)
    assert engine.pool.get_num_free_blocks() == 0
    engine.end(metadata)
    assert engine.pool.get_num_free_blocks() == 5


def test_stores_hold_only_a_share_of_the_engine() -> None:
    """Beyond a quarter of its blocks the engine's requests come first."""
    engine = Engine(num_blocks=40)
    assert scheduler_side.PINNED_SHARE_MAX == 0.25
    requests = [engine.arrive(make_request(name)) for name in "abc"]
    for request in requests:
        engine.admit(request)
    engine.end(engine.step(*((request, 80) for request in requests)))

    metadata = engine.step()
    assert job_blocks(metadata) == [tuple(engine.blocks(request)) for request in requests[:2]]


def test_what_is_over_the_share_is_stored_later() -> None:
    """A prompt longer than the share is stored from its head on, without a gap."""
    engine = Engine(num_blocks=17)
    request = engine.arrive(make_request())
    engine.admit(request)
    engine.end(engine.step((request, 80)))
    metadata = engine.step((request, 1))
    blocks = tuple(engine.blocks(request))
    assert job_blocks(metadata) == [blocks[:4]]
    engine.end(metadata)
    engine.end(engine.step((request, 1)))

    assert job_blocks(engine.step()) == [blocks[4:5]]


def test_stores_in_flight_are_limited_in_number() -> None:
    """More jobs than ``store_jobs_max`` are not begun, and may be again when some have ended."""
    engine = Engine(store_jobs_max=1)
    requests = [engine.arrive(make_request(name)) for name in "abc"]
    for request in requests:
        engine.admit(request)
    engine.end(engine.step(*((request, 80) for request in requests[:2])))
    metadata = engine.step()
    assert job_blocks(metadata) == [tuple(engine.blocks(requests[0]))]
    engine.end(metadata)
    engine.end(engine.step((requests[2], 80)))

    assert job_blocks(engine.step()) == [tuple(engine.blocks(requests[2]))]


def test_the_engine_steps_on_until_the_last_store_is_over() -> None:
    """After the last request two more steps end it: one hands the store out, one hears of it."""
    engine = Engine()
    request = engine.arrive(make_request())
    engine.admit(request)
    metadata = engine.step((request, 80))
    engine.finish(request)
    num_steps = 0
    while engine.side.has_stores_in_flight:
        engine.end(metadata)
        metadata = engine.step()
        num_steps += 1

    assert num_steps == 2
    assert engine.is_idle()


@pytest.mark.parametrize("shares_cores", [False, True])
def test_ranks_rest_while_the_engine_waits_for_stores_alone(shares_cores: bool) -> None:
    """Not in a step that computes, and no longer than until all is stored."""
    engine = Engine()
    engine.side.shares_cores = shares_cores
    request = engine.arrive(make_request(num_tokens=32))
    engine.admit(request)
    computing = engine.step((request, 32))
    engine.end(computing)
    storing = engine.step()
    waiting = engine.step()
    engine.end(storing)
    engine.finish(request)

    found = [step.may_rest for step in (computing, storing, waiting, engine.step())]
    assert found == [False, shares_cores, shares_cores, False]


# ---- failed loads


def failing(*, is_admitted: bool = True) -> tuple[Engine, Any, Any]:
    """An engine, a request that loads four blocks, and a bystander that shares nothing."""
    engine = Engine()
    engine.fake.hold(hashes_of(4))
    request = engine.arrive(make_request())
    other = make_request("other")
    other.prompt_token_ids = other.prompt_token_ids[::-1]
    other._all_token_ids[:] = other.prompt_token_ids
    engine.arrive(other)
    assert engine.admit(other) == 0
    assert not is_admitted or engine.admit(request) == 64
    return engine, request, other


def test_nothing_is_stored_of_a_step_whose_load_failed() -> None:
    """What was computed beside a failed load is computed and stored again, right this time."""
    engine, request, other = failing()
    engine.fail(engine.step((request, 16), (other, 80)), bad=[2, 3])
    assert request.num_computed_tokens == 32
    assert engine.num_held == 10

    again = engine.step((request, 48))
    assert again.stores == []
    engine.end(again)
    (job,) = engine.step((other, 1)).stores
    assert list(job.block_ids) == engine.blocks(request)[2:5]


def test_a_bystander_is_stored_with_its_next_step() -> None:
    """A request whose blocks were discarded for another's sake is stored all the same."""
    engine, request, other = failing()
    engine.fail(engine.step((request, 16), (other, 80)), bad=[0])
    other.append_output_token_ids(7)
    engine.end(engine.step((request, 80), (other, 1)))

    stored = job_blocks(engine.step())
    assert stored == [tuple(engine.blocks(request)), tuple(engine.blocks(other))]


def test_a_step_planned_before_the_failure_was_known_stores_nothing_either() -> None:
    """With asynchronous scheduling the next step is planned, and computed, on what never came."""
    engine, request, other = failing()
    metadata = engine.step((request, 16))
    ahead = engine.step((other, 80))
    engine.fail(metadata, bad=[1])
    engine.end(ahead)

    assert engine.step().stores == []
    assert not engine.side.has_stores_in_flight


def test_stores_of_steps_that_ended_before_the_failure_go_on() -> None:
    """A failure says nothing about blocks of steps that had ended well."""
    engine, request, other = failing(is_admitted=False)
    engine.end(engine.step((other, 80)))
    engine.admit(request)
    metadata = engine.step((request, 16))
    engine.fail(metadata, bad=[0])

    assert job_blocks(metadata) == [tuple(engine.blocks(other))]
    assert engine.side.has_stores_in_flight


def test_an_older_report_confirms_no_later_step() -> None:
    """A step's blocks wait for the report of that step, not for any report."""
    engine, request, other = failing(is_admitted=False)
    before = engine.step()
    engine.admit(request)
    metadata = engine.step((request, 16), (other, 80))
    engine.end(before)
    assert engine.step().stores == []
    engine.fail(metadata, bad=[0])

    assert not engine.side.has_stores_in_flight


def test_a_block_that_never_arrived_is_no_local_hit() -> None:
    """VLLM forgets a bad block and all behind it until they are computed, and only those."""
    engine, request, _ = failing()
    for block_id in engine.blocks(request):
        block = engine.pool.blocks[block_id]
        any_hash = BlockHashWithGroupId(bytes([block_id]) * 36)
        engine.pool._insert_block_hash(any_hash, block, num_tokens=BLOCK_TOKENS)
    engine.fail(engine.step((request, 16)), bad=[2])

    ids = engine.blocks(request)
    known = [block_id for block_id in ids if engine.pool.blocks[block_id].block_hash is not None]
    assert known == ids[:2]


def test_a_request_that_shares_a_bad_block_computes_it_itself() -> None:
    """It is cut back as the loading one is, instead of waiting for a stranger to compute."""
    engine, request, _ = failing()
    sharer = engine.arrive(make_request("sharer", num_tokens=100))
    shared = [engine.pool.blocks[block_id] for block_id in engine.blocks(request)[:4]]
    engine.admit(sharer, local=shared)
    engine.fail(engine.step((request, 16), (sharer, 36)), bad=[1])

    assert request.num_computed_tokens == sharer.num_computed_tokens == BLOCK_TOKENS
    engine.end(engine.step((request, 64)))
    assert job_blocks(engine.step((sharer, 84))) == [tuple(engine.blocks(request)[1:])]


def test_after_an_exception_no_request_in_flight_is_stored() -> None:
    """Once block ids may be missing, a hash could be paired with another block's bytes."""
    engine = Engine()
    request = engine.arrive(make_request())
    engine.admit(request)
    engine.side.stop_storing()
    assert not engine.step((request, 80)).is_awaited

    later = engine.arrive(make_request("later"))
    engine.admit(later)
    assert engine.step((later, 80)).is_awaited


@pytest.mark.parametrize("is_handed_out", [False, True])
def test_a_reset_gives_back_what_was_not_handed_out(is_handed_out: bool) -> None:
    """Blocks computed before a reset are not stored after it."""
    engine = Engine()
    request = engine.arrive(make_request())
    engine.admit(request)
    metadata = engine.step((request, 80))
    if is_handed_out:
        engine.end(metadata)
    engine.side.reset()
    engine.finish(request)

    assert engine.step().stores == []
    assert engine.is_idle()
