"""Requests that name a cartridge: they get its KV, the text is computed, or they fail."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from kvkeep.connector.cartridges import uses
from kvkeep.connector.cartridges.uses import CLIENT_SALT, SALT, TRIES_MAX
from kvkeep.core.effects import NO_SLOT
from kvkeep.model.errors import InputError, RefusedError
from tests.unit.connector.cartridges.serving import (
    DIGEST,
    ServingEngine,
    cartridge_hashes,
    checked,
)
from tests.unit.connector.engines import BLOCK_TOKENS, make_request

PREPENDED: dict[str, Any] = {"cartridge_mode": "prepend", "cartridge_tokens": 64}


def stocked(num_blocks: int = 4, **more: Any) -> ServingEngine:
    """An engine whose pool holds leading blocks of the cartridge."""
    engine = ServingEngine(**more)
    engine.fake.hold(cartridge_hashes(num_blocks))
    return engine


def trained(engine: ServingEngine) -> None:
    """The cartridge knows no ids."""
    engine.library.found["ships"] = checked(has_ids=False)


def ask_trained(engine: ServingEngine, req_id: str = "r") -> Any:
    """A request behind whose 64 placeholders there are 16 tokens."""
    trained(engine)
    request = make_request(req_id)
    for idx in range(64):
        request._all_token_ids[idx] = 0
        request.prompt_token_ids[idx] = 0
    request.kv_transfer_params = {"cartridge_id": "ships", **PREPENDED}
    return engine.arrive(request)


def assert_fails(engine: ServingEngine, request: Any) -> None:
    """The request claims what no rank will bring, so that vLLM ends it with an error."""
    claim = engine.side.match(request, 0)
    assert claim is not None
    assert 0 < claim < request.num_tokens
    table = engine.pool.get_new_blocks(5)
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks

    assert not engine.side.allocated(request, KVCacheBlocks((table,)), claim)
    ids = [block.block_id for block in table]
    engine.side.plan_failure(request.request_id, ids, claim)
    engine.tables[request.request_id] = table
    (load,) = engine.step((request, 1)).loads
    assert set(load.slots) == {NO_SLOT}
    assert ids[0] in load.block_ids


# ---- replace


def test_a_resident_cartridge_is_loaded() -> None:
    """Its whole blocks, under names that no text has, and what is behind them is stored."""
    engine = stocked()
    request = engine.ask()

    assert engine.admit(request) == 64
    assert engine.fake.asked == [cartridge_hashes(4)]
    metadata = engine.step((request, 16))
    assert len(metadata.loads[0].slots) == 4
    engine.end(metadata)
    (job,) = engine.idle_step().stores
    assert job.hashes == cartridge_hashes(5)[4]


def test_the_engines_own_cache_keeps_cartridges_apart() -> None:
    """A request's salt has the cartridge's digest, and what its client said."""
    engine = stocked()

    assert engine.ask("a").cache_salt == f"{SALT}{DIGEST}"
    assert engine.ask("b", salt="own").cache_salt == f"{SALT}{DIGEST}:own"
    assert engine.fake.asked[1] == cartridge_hashes(4, salt="own")


@pytest.mark.parametrize(("own", "suffix"), [(None, ""), ("own", ":own")])
def test_behind_a_router_that_salts_its_blocks_are_the_same(own: str | None, suffix: str) -> None:
    """A cartridge lies in the pool once, whether its requests came past a router or not."""
    engine = stocked()
    request = engine.ask("a", salt=f"{SALT}{DIGEST}{suffix}")

    assert request.cache_salt == f"{SALT}{DIGEST}{suffix}"
    assert engine.fake.asked == [cartridge_hashes(4, **({"salt": own} if own else {}))]


@pytest.mark.parametrize("salt", [f"{SALT}{DIGEST}", f"{SALT}{DIGEST}:own", f"{CLIENT_SALT}x"])
def test_no_client_names_a_cartridges_blocks_by_a_salt(salt: str) -> None:
    """A request that names no cartridge, and sends its salt, meets neither it nor another."""
    engine = stocked()
    plain = engine.arrive(make_request("plain", cache_salt=salt))

    assert plain.cache_salt == f"{CLIENT_SALT}{salt}"
    assert engine.side.match(plain, 0) == 0
    assert not set(engine.fake.asked[0]) & set(cartridge_hashes(4))


def test_a_router_s_salt_names_the_same_blocks() -> None:
    """They are not brought and kept twice."""
    engine = stocked()
    request = engine.ask(salt=f"{SALT}{DIGEST}")

    assert request.cache_salt == f"{SALT}{DIGEST}"
    assert engine.side.match(request, 0) == 64


def test_a_request_that_is_computed_after_all_names_no_cartridge_s_blocks() -> None:
    """Whatever salt it came with: what it computes would be another request's cartridge."""
    engine = ServingEngine()
    engine.fake.is_connected = False
    request = engine.ask(salt=f"{SALT}{'e' * 64}")

    assert engine.side.match(request, 0) is None
    assert request.cache_salt == f"{CLIENT_SALT}{SALT}{'e' * 64}"


def test_until_it_is_known_a_request_shares_nothing() -> None:
    """Its salt is its own alone, and vLLM is to ask again when that has changed."""
    engine = stocked()
    found = engine.library.found.pop("ships")
    request = engine.ask()
    assert "ships r" in request.cache_salt

    assert engine.side.match(request, 0) is None
    engine.library.found["ships"] = found
    engine.library.answer("ships")
    assert engine.side.match(request, 0) is None
    assert request.cache_salt == f"{SALT}{DIGEST}"
    assert engine.side.match(request, 0) == 64


@pytest.mark.parametrize(
    ("num_tokens", "claim"), [(1, 0), (15, 0), (16, 0), (17, 16), (64, 48), (65, 64), (72, 64)]
)
def test_one_token_at_least_is_computed(num_tokens: int, claim: int) -> None:
    """Prompts below a block, equal to the cartridge, and one token longer."""
    engine = stocked()
    request = engine.ask(num_tokens=num_tokens)

    assert engine.side.match(request, 0) == claim


def test_missing_blocks_are_brought_while_the_request_waits() -> None:
    """All of the cartridge's, by all ranks, and then the request is loaded."""
    engine = ServingEngine()
    request = engine.ask()

    assert engine.side.match(request, 0) is None
    (job,) = engine.idle_step().deposits
    assert job.hashes == b"".join(cartridge_hashes(4))
    assert (job.digest, job.path) == (DIGEST, f"{DIGEST}.safetensors")
    num_asked = len(engine.fake.asked)
    assert engine.side.match(request, 0) is None
    assert len(engine.fake.asked) == num_asked
    engine.deposited(job)
    assert engine.side.match(request, 0) == 64
    assert engine.idle_step().deposits == []


def test_every_rank_has_to_bring_its_heads() -> None:
    """One that has ended is not all."""
    engine = ServingEngine(num_ranks=2)
    request = engine.ask()
    engine.side.match(request, 0)
    (job,) = engine.idle_step().deposits

    engine.deposited(job, num_ranks=1, holds=False)
    assert engine.side.match(request, 0) is None
    assert engine.idle_step().deposits == []
    engine.deposited(job, num_ranks=1)
    engine.side.match(request, 0)
    assert engine.side.match(request, 0) == 64


def test_a_cartridge_is_brought_once_for_all_who_wait() -> None:
    """Another one beside it is brought by itself."""
    engine = ServingEngine()
    engine.library.found["trains"] = checked("trains", digest="e" * 64)
    requests = [engine.ask(str(idx)) for idx in range(3)]
    requests.append(engine.ask("other", cartridge_id="trains"))
    for request in requests:
        assert engine.side.match(request, 0) is None

    jobs = engine.idle_step().deposits

    assert [job.digest for job in jobs] == [DIGEST, "e" * 64]
    engine.deposited(*jobs)
    assert [engine.side.match(request, 0) for request in requests] == [64] * 4


def test_blocks_that_the_engine_has_need_not_be_brought() -> None:
    """What its own prefix cache holds under this salt is the cartridge's."""
    engine = ServingEngine()
    request = engine.ask(**PREPENDED)

    assert engine.admit(request, local=engine.pool.get_new_blocks(4)) == 0
    metadata = engine.step((request, 16))
    assert (metadata.deposits, metadata.loads, metadata.is_awaited) == ([], [], True)


def test_blocks_that_the_engine_lost_are_brought() -> None:
    """The middle of a cartridge is no cartridge."""
    engine = stocked(2)
    request = engine.ask()

    assert engine.side.match(request, 48) is None
    assert len(engine.idle_step().deposits) == 1


def test_a_preempted_request_gets_its_cartridge_again() -> None:
    """Also when the pool has lost it meanwhile."""
    engine = stocked()
    request = engine.ask()
    engine.admit(request)
    engine.end(engine.step((request, 16)))
    engine.free(request)
    engine.fake.slots.clear()

    assert engine.side.match(request, 0) is None
    (job,) = engine.idle_step().deposits
    engine.deposited(job)
    engine.side.match(request, 0)
    assert engine.admit(request) == 64


def test_the_daemon_is_told_once_in_each_session() -> None:
    """Which blocks are a cartridge's and whether they stay; anew when it has come back."""
    engine = stocked()
    engine.library.found["ships"] = checked(is_pinned=True)
    for idx in range(2):
        engine.admit(engine.ask(f"a{idx}"))
    engine.fake.session = "second"
    engine.admit(engine.ask("b"))
    engine.library.found["ships"] = checked()
    engine.admit(engine.ask("c"))

    assert engine.fake.kept == [("ships", 4, True), ("ships", 4, True), ("ships", 4, False)]


@pytest.mark.parametrize("cartridges", [True, False])
def test_text_is_computed_where_the_cartridge_can_not_be_had(cartridges: bool) -> None:
    """Without a daemon the request is as any other, under its own salt."""
    engine = ServingEngine(cartridges=cartridges)
    engine.fake.is_connected = False
    request = engine.ask(salt="own")

    assert engine.side.match(request, 0) is None
    assert engine.side.match(request, 0) == 0
    assert request.cache_salt == "own"


def test_text_is_computed_when_a_deposit_fails() -> None:
    """The reason is in the log; the next request tries again."""
    engine = ServingEngine()
    request = engine.ask()
    engine.side.match(request, 0)
    (job,) = engine.idle_step().deposits
    engine.deposited(job, error="the disk is gone")

    assert engine.side.match(request, 0) is None
    assert engine.side.match(request, 0) == 0
    assert engine.side.match(engine.ask("next"), 0) is None
    assert len(engine.idle_step().deposits) == 1


def test_a_pool_without_room_is_given_up() -> None:
    """After some tries, a little later each; the request does not wait for ever."""
    engine = ServingEngine()
    request = engine.ask()
    num_deposits = 0
    for _ in range(1000):
        if engine.side.match(request, 0) is not None:
            break
        jobs = engine.idle_step().deposits
        num_deposits += len(jobs)
        engine.deposited(*jobs, holds=False)
        engine.clock.s += 0.01

    assert engine.side.match(request, 0) == 0
    assert num_deposits == TRIES_MAX
    assert engine.clock.s < 110


def test_a_silent_rank_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deposit that never ends is given up."""
    monkeypatch.setattr(uses, "DEPOSIT_WAIT_S", 10.0)
    engine = ServingEngine()
    request = engine.ask()
    engine.side.match(request, 0)
    engine.idle_step()
    engine.clock.s += 11.0

    assert engine.side.match(request, 0) is None
    assert engine.side.match(request, 0) == 0


def test_what_is_computed_in_its_place_is_not_stored() -> None:
    """Blocks that did not arrive are computed as text, which is not what they are called."""
    engine = stocked(cartridges=False)
    request = engine.ask()
    engine.admit(request)
    engine.fail(engine.step((request, 16)), [1])
    request.num_computed_tokens = 16

    metadata = engine.step((request, 64))
    engine.end(metadata)
    assert engine.idle_step().stores == []


@pytest.mark.parametrize("error", [InputError("there is no cartridge 'ships'"),
                                   RefusedError("dtype mismatch")])  # fmt: skip
def test_a_cartridge_that_can_not_be_used_fails_the_request(error: Exception) -> None:
    """Where failed loads fail requests; where they are computed, the text is."""
    engine = ServingEngine()
    engine.library.found["ships"] = error
    assert_fails(engine, engine.ask())

    computing = ServingEngine(cartridges=False)
    computing.library.found["ships"] = error
    assert computing.side.match(computing.ask(), 0) == 0


def test_another_text_fails() -> None:
    """A prompt that does not begin with the cartridge is no request for it."""
    engine = stocked()
    request = make_request()
    request._all_token_ids[3] = request.prompt_token_ids[3] = 999
    request.kv_transfer_params = {"cartridge_id": "ships"}

    assert_fails(engine, engine.arrive(request))


def test_an_adapter_does_not_go_with_a_cartridge() -> None:
    """Its KV is the model's own."""
    engine = stocked()
    request = make_request(lora_request=LoRARequest("a", 1, "/nowhere"))
    request.kv_transfer_params = {"cartridge_id": "ships"}

    assert_fails(engine, engine.arrive(request))


def test_prompt_logprobs_compute_the_text() -> None:
    """Every token's logits are needed, and the text is there."""
    engine = stocked()
    request = make_request(sampling_params=SamplingParams(max_tokens=4, prompt_logprobs=1))
    request.kv_transfer_params = {"cartridge_id": "ships"}
    engine.arrive(request)

    assert engine.admit(request) == 0
    assert request.cache_salt is None


# ---- prepend


def test_a_prepended_cartridge_is_loaded() -> None:
    """Placeholders as much as tokens with ids of their own."""
    engine = stocked()
    request = engine.ask(**PREPENDED)
    assert engine.admit(request) == 64

    bare = ServingEngine()
    other = ask_trained(bare)
    assert bare.side.match(other, 0) is None
    (job,) = bare.idle_step().deposits
    bare.deposited(job)
    bare.side.match(other, 0)
    assert bare.admit(other) == 64


@pytest.mark.parametrize("reason", ["daemon", "deposit", "load"])
def test_placeholders_are_never_computed(reason: str) -> None:
    """Without its KV the request fails: no daemon, nothing to bring, or loading switched off."""
    engine = ServingEngine(load=reason != "load")
    engine.fake.is_connected = reason != "daemon"
    request = ask_trained(engine)
    if reason == "deposit":
        assert engine.side.match(request, 0) is None
        (job,) = engine.idle_step().deposits
        engine.deposited(job, error="the disk is gone")

    assert engine.side.match(request, 0) is None
    assert_fails(engine, request)


def test_placeholders_are_not_computed_for_logprobs() -> None:
    """The request fails, though vLLM would not even ask."""
    engine = stocked()
    request = make_request(sampling_params=SamplingParams(max_tokens=4, prompt_logprobs=1))
    request.kv_transfer_params = {"cartridge_id": "ships", **PREPENDED}
    assert request.skip_reading_prefix_cache
    engine.arrive(request)

    assert not request.skip_reading_prefix_cache
    assert_fails(engine, request)


def test_a_smaller_claim_than_offered_fails() -> None:
    """VLLM may take less; then it would compute what it does not have."""
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks

    engine = stocked()
    request = engine.ask(**PREPENDED)
    assert engine.side.match(request, 0) == 64
    table = engine.pool.get_new_blocks(5)

    assert not engine.side.allocated(request, KVCacheBlocks((table,)), 48)


def test_a_preempted_request_fails_without_its_cartridge() -> None:
    """Its placeholders are not computed on the way back either."""
    engine = stocked()
    request = engine.ask(**PREPENDED)
    engine.admit(request)
    engine.end(engine.step((request, 16)))
    engine.free(request)
    engine.fake.slots.clear()
    engine.fake.is_connected = False

    assert engine.side.match(request, 0) is None
    assert_fails(engine, request)


def test_an_engine_that_computes_refuses_to_prepend() -> None:
    """Under ``recompute`` vLLM would compute placeholders after a failed load."""
    engine = stocked(cartridges=False)
    request = engine.ask(**PREPENDED)

    assert engine.fake.asked == [] or engine.fake.asked[0] != cartridge_hashes(4)
    assert request.cache_salt is None


def test_a_request_that_ends_leaves_nothing() -> None:
    """In whatever state: waiting for a file, for blocks, running, or refused."""
    engine = ServingEngine()
    engine.library.found["late"] = RefusedError("no")
    waiting = engine.ask("waiting", cartridge_id="unread")
    bringing = engine.ask("bringing")
    refused = engine.ask("refused", cartridge_id="late")
    engine.side.match(bringing, 0)
    for request in (waiting, bringing, refused):
        engine.finish(request)

    assert engine.is_idle()
    assert not engine.serving._uses
    assert BLOCK_TOKENS == 16
