"""Both engines of a handoff through the pool: what is stored, named, waited for, and refused."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from kvkeep.connector.scheduler import handoff
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import Namespace
from tests.unit.connector.engines import BLOCK_TOKENS, NAMESPACE, Engine, make_request

PROMPT_TOKENS = 80
"""Five blocks; the last one holds the last token and is never loaded."""


def handed(params: Any, req_id: str = "r", **more: Any) -> Request:
    """A request with these ``kv_transfer_params``."""
    sampling = SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": params})
    return make_request(req_id, PROMPT_TOKENS, sampling_params=sampling, **more)


def prefill(req_id: str = "p", **more: Any) -> Request:
    """What a router sends to the prefill engine."""
    return handed({"kvkeep": {"hand_off": "prefill"}}, req_id, **more)


def hashes_of(num_blocks: int, namespace: Namespace = NAMESPACE) -> list[Any]:
    """Hashes of the blocks of ``make_request``'s tokens."""
    hasher = BlockHasher(namespace, BLOCK_TOKENS)
    return list(hasher.extend(list(range(num_blocks * BLOCK_TOKENS))))


def ticket(num_blocks: int = 5) -> dict[str, Any]:
    """What a prefill engine names of the prompt."""
    return {"ticket": hashes_of(num_blocks)[-1].hex(), "tokens": num_blocks * BLOCK_TOKENS}


def decode(req_id: str = "d", **changed: Any) -> Request:
    """What a router sends to the decode engine."""
    return handed({"kvkeep": {"hand_off": "decode", **ticket(), **changed}}, req_id)


def outcomes(engine: Engine) -> list[tuple[str, int]]:
    """Outcomes that the daemon was told, with the blocks that were missed."""
    return [(outcome, num_missed) for outcome, num_missed, _ in engine.fake.handoffs]


def compute(engine: Engine, request: Request) -> None:
    """Admit and run its prompt."""
    assert engine.admit(request) is not None
    engine.end(engine.step((request, PROMPT_TOKENS)))


# ---- the prefill engine


def test_a_prefill_names_the_last_full_block_of_its_prompt() -> None:
    """Its answer holds the block's hash and how many tokens lie up to it."""
    engine = Engine()
    request = engine.arrive(prefill())
    compute(engine, request)

    assert engine.finish(request) == {"kvkeep": ticket(5)}
    assert outcomes(engine) == [("offered", 0)]
    metadata = engine.step()
    assert b"".join(job.hashes for job in metadata.stores) == b"".join(hashes_of(5))
    assert all(job.is_urgent for job in metadata.stores)
    engine.end(metadata)
    assert engine.is_idle()


def test_a_prefill_is_stored_whole_whatever_the_limits_of_stores_say() -> None:
    """There is no later step in which the rest could be stored."""
    engine = Engine(num_blocks=9, store_jobs_max=1)
    request = engine.arrive(prefill())
    assert engine.admit(request) == 0
    engine.end(engine.step((request, 32)))
    engine.end(engine.step((request, 48)))

    assert engine.finish(request) == {"kvkeep": ticket(5)}


def test_a_prompt_without_a_full_block_has_an_empty_ticket() -> None:
    """There is nothing to hand over, and the router is told that nothing went wrong."""
    engine = Engine()
    sampling = SamplingParams(
        max_tokens=4, extra_args={"kv_transfer_params": {"kvkeep": {"hand_off": "prefill"}}}
    )
    request = engine.arrive(make_request("p", BLOCK_TOKENS - 1, sampling_params=sampling))
    assert engine.admit(request) == 0
    engine.end(engine.step((request, BLOCK_TOKENS - 1)))

    assert engine.finish(request) == {"kvkeep": {"ticket": "", "tokens": 0}}


def test_what_the_pool_has_is_named_without_being_stored_again() -> None:
    """A prefix that another request left in the pool is as good as one that was stored now."""
    engine = Engine()
    engine.fake.hold(hashes_of(4))
    request = engine.arrive(prefill())
    assert engine.admit(request) == 4 * BLOCK_TOKENS
    engine.end(engine.step((request, BLOCK_TOKENS)))

    assert engine.finish(request) == {"kvkeep": ticket(5)}
    assert [job.hashes for job in engine.step().stores] == [hashes_of(5)[-1]]


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR])
def test_a_prefill_that_was_not_answered_names_nothing(status: RequestStatus) -> None:
    """Nobody is there to be told, and nothing is held for anybody."""
    engine = Engine()
    request = engine.arrive(prefill())
    compute(engine, request)

    assert engine.finish(request, status) is None
    assert outcomes(engine) == []
    engine.end(engine.step())
    assert engine.is_idle()


def test_a_prefill_without_a_daemon_names_nothing() -> None:
    """A block that was not stored is not named; the answer itself is as always."""
    engine = Engine()
    engine.fake.is_connected = False
    request = engine.arrive(prefill())
    compute(engine, request)

    assert engine.finish(request) is None
    assert outcomes(engine) == [("not_offered", 0)]


def test_what_cannot_be_named_is_not_offered() -> None:
    """A prompt that kvkeep passes by is counted as a handoff that could not be."""
    engine = Engine()
    request = engine.arrive(prefill(resumable=True))
    compute(engine, request)

    assert engine.finish(request) is None
    assert outcomes(engine) == [("not_offered", 0)]


def test_an_ordinary_request_answers_nothing() -> None:
    """Only who asks for a ticket gets one."""
    engine = Engine()
    request = engine.arrive(make_request())
    compute(engine, request)

    assert engine.finish(request) is None
    assert outcomes(engine) == []


# ---- the decode engine


def test_blocks_that_are_there_are_loaded_at_once() -> None:
    """All but the block that holds the last token, which is computed for the logits."""
    engine = Engine()
    engine.fake.hold(hashes_of(5))
    request = engine.arrive(decode())

    assert engine.admit(request) == 4 * BLOCK_TOKENS
    assert outcomes(engine) == [("whole", 0)]
    (load,) = engine.step((request, BLOCK_TOKENS)).loads
    assert load.hashes == b"".join(hashes_of(4))


def test_blocks_on_their_way_are_waited_for() -> None:
    """While they are not there the request is passed over; when they are, all are loaded."""
    engine = Engine()
    engine.fake.hold(hashes_of(2))
    request = engine.arrive(decode())

    assert engine.admit(request) is None
    assert engine.fake.leases == {}
    engine.fake.hold(hashes_of(5)[2:])
    engine.clock.s += handoff.PAUSE_MAX_S

    assert engine.admit(request) == 4 * BLOCK_TOKENS
    assert outcomes(engine) == [("whole", 0)]
    assert engine.fake.handoffs[0][2] == pytest.approx(1e6 * handoff.PAUSE_MAX_S, abs=1)


def test_ranks_rest_while_blocks_are_on_their_way() -> None:
    """Who brings them may need the cores; once they are there nothing is lost by resting."""
    engine = Engine(store=False)
    engine.side.shares_cores = True
    request = engine.arrive(decode())
    assert engine.admit(request) is None
    assert engine.step().may_rest
    engine.fake.hold(hashes_of(5))
    engine.clock.s += handoff.PAUSE_MAX_S
    assert engine.admit(request)

    assert not engine.step((request, BLOCK_TOKENS)).may_rest
    assert not engine.step().may_rest


def test_the_wait_is_bounded_and_then_takes_what_is_there() -> None:
    """A block that never comes costs the setting's time, and is computed."""
    engine = Engine(handoff_wait_s=0.5)
    engine.fake.hold(hashes_of(2))
    request = engine.arrive(decode())
    begun_s = engine.clock.s
    while (offered := engine.side.match(request, 0)) is None:
        engine.clock.s += 0.01

    assert offered == 2 * BLOCK_TOKENS
    assert engine.clock.s - begun_s == pytest.approx(0.5, abs=0.02)
    assert outcomes(engine) == [("partial", 2)]
    # Twice as long each time: some ten questions, not one in each of the fifty steps.
    assert 5 <= len(engine.fake.asked) <= 16


def test_nothing_is_waited_for_without_a_daemon() -> None:
    """Who can't be asked will not lend anything."""
    engine = Engine()
    engine.fake.is_connected = False
    request = engine.arrive(decode())

    assert engine.admit(request) == 0
    assert outcomes(engine) == [("partial", 4)]


def test_nothing_is_waited_for_that_the_engine_has() -> None:
    """A prompt that is still on the decode engine needs no blocks from elsewhere."""
    engine = Engine()
    request = engine.arrive(decode())

    assert engine.admit(request, local=engine.pool.get_new_blocks(4)) == 0
    assert outcomes(engine) == [("whole", 0)]


def test_a_handoff_is_loaded_however_fast_the_engine_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompt was computed elsewhere so that this engine need not stop for it."""
    engine = Engine()
    monkeypatch.setattr(engine.side.costs, "is_load_worth", lambda *_: False)
    engine.fake.hold(hashes_of(5))

    assert engine.admit(engine.arrive(decode())) == 4 * BLOCK_TOKENS
    assert engine.admit(engine.arrive(make_request("ordinary"))) == 0


def test_a_request_that_goes_while_it_waits_leaves_nothing() -> None:
    """An abort in the wait gives back what was lent and forgets what was asked."""
    engine = Engine()
    engine.fake.hold(hashes_of(2))
    request = engine.arrive(decode())
    assert engine.admit(request) is None
    engine.finish(request, RequestStatus.FINISHED_ABORTED)

    assert engine.is_idle()


def test_a_reset_ends_the_wait() -> None:
    """After a reset nothing that was stored before may be loaded, so nothing is waited for."""
    engine = Engine()
    request = engine.arrive(decode())
    assert engine.admit(request) is None
    engine.side.reset()
    engine.clock.s += handoff.PAUSE_MAX_S

    assert engine.admit(request) == 0


# ---- what anybody may send


@pytest.mark.parametrize(
    "changed",
    [
        {"ticket": "00" * 32},
        {"ticket": hashes_of(4)[-1].hex()},
        {"ticket": hashes_of(5, Namespace(b"o" * 32))[-1].hex()},
        {"tokens": 6 * BLOCK_TOKENS},
        {"tokens": 5 * BLOCK_TOKENS + 1},
        {"tokens": 1},
    ],
    ids=["invented", "shorter", "other-namespace", "too-long", "no-whole-blocks", "no-block"],
)
def test_a_ticket_for_other_blocks_is_refused_without_a_wait(changed: dict[str, Any]) -> None:
    """It opens nothing: the request finds what any other would."""
    engine = Engine()
    engine.fake.hold(hashes_of(2))

    assert engine.admit(engine.arrive(decode(**changed))) == 2 * BLOCK_TOKENS
    assert outcomes(engine) == [("refused", 0)]


@pytest.mark.parametrize(
    "params",
    [
        {"kvkeep": None},
        {"kvkeep": "prefill"},
        {"kvkeep": []},
        {"kvkeep": {}},
        {"kvkeep": {"hand_off": "both"}},
        {"kvkeep": {"hand_off": ["prefill"]}},
        {"kvkeep": {"hand_off": "prefill", "more": 1}},
        {"kvkeep": {"hand_off": "decode"}},
        {"kvkeep": {"hand_off": "decode", "ticket": 7, "tokens": 16}},
        {"kvkeep": {"hand_off": "decode", "ticket": "é" * 64, "tokens": 16}},
        {"kvkeep": {"hand_off": "decode", "ticket": "0" * 64, "tokens": "16"}},
        {"kvkeep": {"hand_off": "decode", "ticket": "0" * 64, "tokens": -1}},
        {"kvkeep": {"hand_off": "decode", "ticket": "0" * 64, "tokens": 1e300}},
        {"kvkeep": {"hand_off": "decode", "ticket": "0" * 65, "tokens": 16}},
    ],
)
def test_malformed_parameters_are_counted_and_else_ignored(params: dict[str, Any]) -> None:
    """The request is answered as if they were not there."""
    engine = Engine()
    request = engine.arrive(handed(params))
    compute(engine, request)

    assert engine.finish(request) is None
    assert outcomes(engine) == [("refused", 0)]


@pytest.mark.parametrize(
    "params", [None, {}, {"do_remote_decode": True, "remote_host": None}, "x", ["kvkeep"]]
)
def test_parameters_for_other_connectors_are_none_of_ours(params: Any) -> None:
    """Beside others in one engine, kvkeep reads only its own field."""
    engine = Engine()
    request = engine.arrive(handed(params))
    compute(engine, request)

    assert engine.finish(request) is None
    assert outcomes(engine) == []


def test_a_flood_of_bad_parameters_is_not_a_flood_of_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Anybody may send them, so only the first, the second, the fourth and so on are told."""
    engine = Engine()
    for idx in range(100):
        engine.arrive(handed({"kvkeep": idx}, f"r{idx}"))

    assert len(caplog.records) == 7
    assert outcomes(engine) == [("refused", 0)] * 100
