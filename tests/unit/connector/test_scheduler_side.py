"""The scheduler side's lookups and loads: what is asked, claimed, planned and given back."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from kvkeep.client.prefixes import PrefixClient
from kvkeep.connector import scheduler_side
from kvkeep.core.effects import NO_SLOT
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import Namespace
from tests.unit.connector.engines import (
    BLOCK_TOKENS,
    NAMESPACE,
    Engine,
    ManualClock,
    make_request,
)


def hashes_of(num_blocks: int, **extras: str) -> list[Any]:
    """Hashes of the blocks of ``make_request``'s tokens."""
    hasher = BlockHasher(NAMESPACE, BLOCK_TOKENS, extras=extras)
    return list(hasher.extend(list(range(num_blocks * BLOCK_TOKENS))))


def stocked(num_blocks: int = 4, **settings: Any) -> Engine:
    """An engine whose pool holds the first blocks of every ``make_request``."""
    engine = Engine(**settings)
    engine.fake.hold(hashes_of(num_blocks))
    return engine


# ---- what is asked


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(64, 3), (65, 4), (79, 4), (80, 4)])
def test_one_token_always_stays_to_be_computed(num_tokens: int, num_blocks: int) -> None:
    """The block that holds the last token is never asked for, even if it is full."""
    engine = stocked(5)
    request = engine.arrive(make_request(num_tokens=num_tokens))

    assert engine.fake.asked == [hashes_of(num_blocks)]
    assert engine.side.match(request, 0) == num_blocks * BLOCK_TOKENS


@pytest.mark.parametrize("num_tokens", [1, 15, 16])
def test_a_prompt_below_a_block_asks_nothing(num_tokens: int) -> None:
    """A prompt with no whole block besides its last token costs no message."""
    engine = stocked()
    request = engine.arrive(make_request(num_tokens=num_tokens))

    assert engine.side.match(request, 0) == 0
    assert engine.fake.asked == []


def test_prompt_logprobs_compute_everything() -> None:
    """A request that needs logits of its whole prompt loads nothing, but is stored."""
    engine = stocked()
    parameters = SamplingParams(max_tokens=4, prompt_logprobs=1)
    request = engine.arrive(make_request(sampling_params=parameters))

    assert engine.admit(request) == 0
    assert engine.fake.asked == []
    assert engine.step((request, 80)).is_awaited


def test_a_switched_off_load_asks_nothing() -> None:
    """With ``load: false`` blocks are stored but never asked for."""
    engine = stocked(load=False)
    request = engine.arrive(make_request())

    assert engine.side.match(request, 0) == 0
    assert engine.fake.asked == []


def test_a_salt_gives_other_names() -> None:
    """Requests with different cache salts never meet, not even in the first block."""
    engine = stocked()
    salted = engine.arrive(make_request("a", cache_salt="x"))
    engine.arrive(make_request("b", cache_salt="y"))
    engine.arrive(make_request("c"))

    assert engine.side.match(salted, 0) == 0
    assert engine.fake.asked[0] == hashes_of(4, salt="x")
    assert len({tuple(asked) for asked in engine.fake.asked}) == 3


def test_a_tenants_key_gives_other_names() -> None:
    """Hashes are made with the tenant's key: token ids alone don't give them."""
    engine = stocked()
    engine.side.chain_key = b"k" * 32
    request = engine.arrive(make_request())

    keyed = BlockHasher(NAMESPACE, BLOCK_TOKENS, secret=b"k" * 32)
    assert engine.side.match(request, 0) == 0
    assert engine.fake.asked == [keyed.extend(list(range(4 * BLOCK_TOKENS)))]


@pytest.mark.parametrize(
    "more",
    [
        {"mm_features": [object()]},
        {"resumable": True},
        {"lora_request": LoRARequest("a", 1, "/nowhere")},
    ],
    ids=["media", "pieces", "unknown-lora"],
)
def test_what_cannot_be_named_is_passed_by(more: dict[str, Any]) -> None:
    """A request whose KV depends on something unnamed is neither loaded nor stored."""
    engine = stocked()
    request = engine.arrive(make_request(**more))

    assert engine.admit(request) == 0
    assert engine.fake.asked == []
    assert not engine.step((request, 80)).is_awaited


def test_embeddings_are_passed_by() -> None:
    """A prompt without token ids is neither loaded nor stored."""
    engine = stocked()
    request = make_request()
    request.prompt_embeds = object()
    engine.arrive(request)

    assert engine.admit(request) == 0
    assert not engine.step((request, 80)).is_awaited


# ---- claims


@pytest.mark.parametrize(
    ("num_local_tokens", "claim"), [(0, 64), (16, 48), (48, 16), (64, 0), (96, 0), (24, 40)]
)
def test_the_claim_goes_beyond_what_the_engine_has(num_local_tokens: int, claim: int) -> None:
    """Only tokens that the engine does not have are offered, however they are counted."""
    engine = stocked()
    request = engine.arrive(make_request(num_tokens=100))

    assert engine.side.match(request, num_local_tokens) == claim


def test_a_repeated_lookup_costs_nothing_and_follows_the_local_hit() -> None:
    """A request that waits for room is asked about again and again under one lease."""
    engine = stocked()
    request = engine.arrive(make_request())

    assert [engine.side.match(request, n) for n in (48, 32, 0, 16)] == [16, 32, 64, 48]
    assert len(engine.fake.asked) == len(engine.fake.leases) == 1


def test_a_load_is_planned_from_what_vllm_took() -> None:
    """Blocks, slots and hashes of a load are those behind the local hit, as far as vLLM took."""
    engine = stocked()
    request = engine.arrive(make_request())
    local = engine.pool.get_new_blocks(1)

    assert engine.admit(request, local=local, num_external=24) == 48

    (load,) = engine.step((request, 40)).loads
    assert load.slots == (101, 102)
    assert load.hashes == b"".join(hashes_of(4)[1:3])
    assert list(load.block_ids) == engine.blocks(request)[1:3]


def test_a_claim_that_vllm_drops_gives_the_lease_back() -> None:
    """If vLLM loads nothing after all, the lease ends and nothing is planned."""
    engine = stocked()
    request = engine.arrive(make_request())
    engine.admit(request, num_external=0)

    assert engine.step((request, 80)).loads == []
    assert engine.fake.leases == {}


def test_what_can_not_be_worth_a_load_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if the pool had all of it."""
    engine = stocked()
    monkeypatch.setattr(engine.side.costs, "is_load_worth", lambda num_tokens, _: num_tokens > 64)
    request = engine.arrive(make_request())

    assert engine.side.match(request, 0) == 0
    assert engine.fake.asked == []


def test_a_load_that_is_not_worth_it_gives_the_lease_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed instead, counted, and not stored once more."""
    engine = stocked()
    monkeypatch.setattr(engine.side.costs, "is_load_worth", lambda num_tokens, _: num_tokens > 48)
    request = engine.arrive(make_request())

    assert engine.side.match(request, 16) == 0
    assert engine.fake.leases == {}
    assert engine.fake.released == [{"num_declined": 3}]
    assert engine.side.match(request, 16) == 0
    engine.admit(request, num_external=0)
    engine.end(engine.step((request, 80)))
    (job,) = engine.step().stores
    assert list(job.block_ids) == engine.blocks(request)[4:5]


def test_a_lease_ends_when_its_load_is_reported() -> None:
    """The lease holds from the claim to the report, which tells the daemon how it went."""
    engine = stocked()
    request = engine.arrive(make_request())
    engine.admit(request)
    metadata = engine.step((request, 16))

    assert len(engine.fake.leases) == 1
    engine.end(metadata)
    assert engine.fake.leases == {}
    assert engine.fake.released == [{"num_loaded": 4, "num_failed": 0, "load_us": 7}]


def test_an_old_lease_is_renewed_before_it_is_used() -> None:
    """A lease past the first half of its time is given back and asked for anew."""
    engine = stocked()
    request = engine.arrive(make_request())
    engine.side.match(request, 0)
    engine.clock.s += 30.0 * scheduler_side.LEASE_MARGIN + 1

    assert engine.side.match(request, 0) == 64
    assert len(engine.fake.asked) == 2
    (lease,) = engine.fake.leases.values()
    assert lease.deadline_s == engine.clock.s + 30.0


# ---- waiting


def test_a_request_waits_while_its_answer_is_on_the_way() -> None:
    """Without an answer vLLM is told to ask again; with it the claim is made."""
    engine = stocked()
    engine.fake.is_pending = True
    request = engine.arrive(make_request())

    assert engine.side.match(request, 0) is None
    engine.fake.is_pending = False
    assert engine.side.match(request, 0) == 64


def test_one_step_waits_once_for_all_its_requests() -> None:
    """What one lookup waited is missing for the next; a new step may wait anew."""
    engine = stocked(lookup_wait_ms=5.0)
    engine.fake.is_pending = True
    requests = [engine.arrive(make_request(name)) for name in "ab"]
    for request in requests:
        engine.side.match(request, 0)
    engine.step()
    engine.side.match(requests[0], 0)

    assert engine.fake.waits_s == pytest.approx([0.005, 0.0, 0.005])


class SilentConnection:
    """A session on which no answer ever comes."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock

    def lease_s(self, wanted_s: float) -> float:
        """As long as is wanted."""
        return wanted_s

    def next_request_id(self) -> int:
        """One question is enough."""
        return 1

    def send(self, _: object) -> None:
        """It goes nowhere."""

    def receive(self, wait_s: float) -> list[object]:
        """Wait in vain."""
        self._clock.s += max(wait_s, 0.0)
        return []


class SilentLink:
    """A link to a daemon that froze."""

    def __init__(self, clock: ManualClock) -> None:
        self.connection: SilentConnection | None = SilentConnection(clock)

    def lost(self, _: object, __: object) -> None:
        """It is given up."""
        self.connection = None


def test_a_frozen_daemon_holds_a_request_up_for_its_patience_only() -> None:
    """The answer None is bounded in time; after that the request computes."""
    clock = ManualClock()
    link: Any = SilentLink(clock)
    prefixes = PrefixClient(link, clock, lease_s=30.0, patience_s=0.25)
    engine = Engine(prefixes=prefixes, clock=clock, lookup_wait_ms=2.0)
    request = engine.arrive(make_request())
    begun_s, num_steps = clock.s, 0
    while (claim := engine.side.match(request, 0)) is None:
        engine.step()
        num_steps += 1

    assert claim == 0
    assert link.connection is None
    assert num_steps == pytest.approx(125, abs=2)
    assert clock.s - begun_s == pytest.approx(0.25, abs=0.01)


def test_a_lost_daemon_is_a_miss() -> None:
    """A question whose daemon died, and every later one, is answered with nothing at once."""
    engine = stocked()
    engine.fake.is_pending = True
    asked = engine.arrive(make_request("asked"))
    engine.side.match(asked, 0)
    engine.fake.is_connected = False
    later = engine.arrive(make_request("later"))

    assert engine.side.match(asked, 0) == 0
    assert engine.side.match(later, 0) == 0
    assert engine.admit(later) == 0
    assert not engine.step((later, 80)).is_awaited


# ---- failing loads


def test_a_failed_load_is_not_tried_again() -> None:
    """After a failed load the request computes, even when it is preempted and looked up anew."""
    engine = stocked()
    request = engine.arrive(make_request())
    engine.admit(request)
    engine.fail(engine.step((request, 16)), bad=[1, 2, 3], corrupt=[1])
    engine.free(request)

    assert engine.fake.corrupt == [(NAMESPACE, [hashes_of(2)[1]])]
    assert engine.fake.released == [{"num_loaded": 1, "num_failed": 3, "load_us": 7}]
    assert engine.side.match(request, 0) == 0
    assert len(engine.fake.asked) == 1


def test_a_load_that_cannot_be_planned_is_planned_to_fail() -> None:
    """VLLM counts on the load, so its blocks, and no others, are declined by every rank."""
    engine = stocked()
    request = engine.arrive(make_request())
    local = engine.pool.get_new_blocks(1)
    engine.side.match(request, BLOCK_TOKENS)
    engine.tables["r"] = [*local, *engine.pool.get_new_blocks(4)]
    engine.side.plan_failure("r", engine.blocks(request), 48)
    metadata = engine.step((request, 16))

    (load,) = metadata.loads
    assert list(load.block_ids) == engine.blocks(request)[1:4]
    assert set(load.slots) == {NO_SLOT}
    engine.fail(metadata, bad=[0, 1, 2])
    engine.finish(request)
    assert engine.is_idle()


# ---- the end of requests


def test_a_preempted_request_asks_anew() -> None:
    """After a preemption the lookup starts over, with new blocks, and the old lease is over."""
    engine = stocked()
    request = engine.arrive(make_request())
    engine.admit(request)
    engine.end(engine.step((request, 16)))
    engine.free(request)
    before = engine.pool.get_new_blocks(3)
    assert engine.admit(request) == 64

    (load,) = engine.step((request, 16)).loads
    assert list(load.block_ids) == engine.blocks(request)[:4]
    assert len(engine.fake.asked) == 2
    assert len(engine.fake.leases) == 1
    engine.pool.free_blocks(before)


def test_a_load_planned_before_the_last_one_reported_keeps_its_own_lease() -> None:
    """Each report ends the lease of its own load, though both are of one request."""
    engine = stocked()
    request = engine.arrive(make_request())
    engine.admit(request)
    first = engine.step((request, 16))
    engine.free(request)
    engine.admit(request)
    second = engine.step((request, 16))
    assert len(engine.fake.leases) == 2

    engine.end(first)
    assert [lease.lease_id for lease in engine.fake.leases.values()] == [2]
    engine.end(second)
    assert engine.fake.leases == {}


@pytest.mark.parametrize("phase", ["asked", "leased", "loading", "loaded", "storing", "preempted"])
def test_an_abort_leaves_nothing_behind(phase: str) -> None:
    """Wherever a request stands when its client goes, no lease, no block and no state stays."""
    engine = stocked()
    engine.fake.is_pending = phase == "asked"
    request = engine.arrive(make_request())
    steps = []
    if phase != "asked":
        engine.side.match(request, 0)
    if phase in ("loading", "loaded", "storing", "preempted"):
        engine.admit(request)
        steps.append(engine.step((request, 16)))
    if phase in ("loaded", "storing", "preempted"):
        engine.end(steps.pop())
    if phase == "storing":
        steps.append(engine.step())
    if phase == "preempted":
        engine.free(request)
        engine.side.match(request, 0)
    engine.finish(request)
    for metadata in steps:
        engine.end(metadata)
    while engine.side.has_stores_in_flight:
        engine.end(engine.step())

    assert engine.is_idle()


def test_a_reset_separates_before_and_after() -> None:
    """After a reset nothing of before is loaded, and requests in flight do neither."""
    engine = stocked()
    waiting, running = (engine.arrive(make_request(name)) for name in ("waiting", "running"))
    engine.admit(running, num_external=0)
    engine.end(engine.step((running, 40)))
    engine.side.reset()

    assert engine.side.match(waiting, 0) == 0
    assert engine.fake.leases == {}
    after = engine.step((running, 40))
    assert (after.stores, after.is_awaited) == ([], False)
    assert after.namespace != after.base_namespace == NAMESPACE
    engine.end(after)
    later = engine.arrive(make_request("later"))
    assert engine.side.match(later, 0) == 0
    assert engine.fake.asked[-1] != hashes_of(4)


def test_a_reset_keeps_the_load_under_way() -> None:
    """A load of before the reset reports what it found corrupt under the names of before."""
    engine = stocked()
    request = engine.arrive(make_request())
    engine.admit(request)
    metadata = engine.step((request, 16))
    engine.side.reset()
    engine.fail(metadata, bad=[3], corrupt=[3])

    assert engine.fake.corrupt == [(Namespace(NAMESPACE), [hashes_of(4)[3]])]
    engine.finish(request)
    assert engine.is_idle()
