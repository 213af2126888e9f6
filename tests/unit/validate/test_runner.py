"""Phases: what was asked, what counters did, and where tokens came from."""

from collections.abc import Callable

import httpx
import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore
from kvkeep.validate import runner
from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import Counters
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.runner import Phase, Served, Watch, median_ttft_s, run_phase, served_in

Connect = Callable[..., Endpoint]
LONG = Prompt("long", " ".join(f"w{i}" for i in range(60)))

pytestmark = pytest.mark.usefixtures("no_pauses")


def salted(i: int, prompt: Prompt) -> str:
    return "run"


async def test_a_phase_counts_what_it_caused(connect: Connect, store: FakeStore) -> None:
    """Counters of a phase are differences: stored the first time, from the engine the second."""
    fake = FakeEngine(store=store)
    watch = Watch(connect(fake), connect(fake))

    first = await run_phase("one", watch, [LONG], Sampling(4), salt_of=salted)
    second = await run_phase("two", watch, [LONG], Sampling(4), salt_of=salted)

    assert first.delta.daemon["blocks_stored"] == 4
    assert (first.delta.local_hit_tokens, first.delta.external_hit_tokens) == (0, 0)
    assert second.delta.daemon["blocks_stored"] == 0
    assert second.delta.local_hit_tokens == 64


async def test_progress_is_told_about_every_answer(connect: Connect) -> None:
    """Progress names the phase and counts to its end."""
    told: list[tuple[str, int, int]] = []

    await run_phase(
        "one",
        Watch(connect(FakeEngine())),
        [LONG, LONG],
        Sampling(1),
        salt_of=salted,
        progress=lambda *news: told.append(news),
    )

    assert told == [("one", 1, 2), ("one", 2, 2)]


async def test_counters_are_read_until_they_rest(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading counts once two in a row agree, for stores run behind the answers."""
    moving = iter([1, 2, 3, 3, 9])

    async def read(*_: object) -> Counters:
        return Counters({}, {"blocks_stored": next(moving)})

    monkeypatch.setattr(runner, "read_counters", read)
    watch = Watch(connect(FakeEngine()))

    assert (await watch.read_settled()).daemon == {"blocks_stored": 3}
    assert len(watch.readings) == 4


async def test_counters_that_never_rest_end_the_wait(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A counter that others move all the time does not hold a run up for ever."""
    moving = iter(range(10_000))

    async def read(*_: object) -> Counters:
        return Counters({}, {"blocks_stored": next(moving)})

    monkeypatch.setattr(runner, "read_counters", read)
    watch = Watch(connect(FakeEngine()))

    await watch.read_settled()

    assert len(watch.readings) == runner.SETTLE_READINGS_MAX + 1


async def test_a_daemon_without_counters_is_unavailable(connect: Connect) -> None:
    """A run that cannot read the daemon it was told of stops, instead of reporting zeros."""
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={}))
    async with Endpoint("http://daemon", transport=transport) as daemon:
        watch = Watch(connect(FakeEngine()), daemon)
        with pytest.raises(UnavailableError, match="no counters"):
            await run_phase("one", watch, [LONG], Sampling(1), salt_of=salted)


def test_a_share_below_four_fifths_proves_nothing() -> None:
    """Eighty percent of what the outside could serve is the least that counts."""
    assert Served(80, 0, 100, 0).why_not_exercised() is None
    assert "79%" in (Served(79, 0, 100, 0).why_not_exercised() or "")


def test_tokens_from_the_engine_itself_do_not_count() -> None:
    """What the engine kept says nothing about the cache under test."""
    assert Served(0, 100, 100, 0).why_not_exercised() is not None


@pytest.mark.parametrize("servable", [None, 0])
def test_an_unknown_share_proves_nothing(servable: int | None) -> None:
    """Nothing servable, or not known to be, is not exercised."""
    served = Served(0, 0, servable, servable)

    assert served.share is None
    assert served.why_not_exercised() is not None


def test_a_failed_answer_does_not_hide_the_share() -> None:
    """Answers that say nothing about their prompt are left out of what was servable."""
    answers = (Answer(prompt_token_ids=tuple(range(9))), Answer(error="HTTP 500"))
    delta = Counters({"vllm:external_prefix_cache_hits": 8.0}, {})
    phase = Phase("p", (LONG, LONG), answers, delta, 1.0)

    assert served_in(phase, 4).share == 1.0
    assert served_in(phase, None).share is None


def test_the_median_ignores_answers_without_a_token() -> None:
    """Times to first token are of answers that had one."""
    assert median_ttft_s([Answer(ttft_s=0.1), Answer(), Answer(ttft_s=0.3)]) == pytest.approx(0.2)
    assert median_ttft_s([Answer()]) is None
