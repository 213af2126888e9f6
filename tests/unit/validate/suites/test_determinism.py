"""The suite: passes on a right stack, and every planted fault has the verdict it deserves."""

from collections.abc import Callable
from typing import Any

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.answer import Prompt
from kvkeep.validate.capability import probe
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import load_words
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subject import Subject
from kvkeep.validate.suite.base import SuiteReport
from kvkeep.validate.suites.determinism import Determinism, fit_word_count, make_plan
from kvkeep.validate.verdict import Verdict

Connect = Callable[..., Endpoint]
WORDS = 60
SETTINGS = CheckSettings(max_iterations=7, control_interval=5, word_count=WORDS)

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def check(connect: Connect) -> Callable[..., Any]:
    """Runs the suite against a fake engine."""

    async def run(
        fake: FakeEngine, *, exact: bool = False, small: FakeEngine | None = None
    ) -> SuiteReport:
        engine = connect(fake)
        subject = Subject(
            engine,
            await probe(engine),
            connect(fake) if fake.store is not None else None,
            small=connect(small) if small else None,
            small_capabilities=await probe(connect(small)) if small else None,
        )
        plan = make_plan(SETTINGS, load_words(), WORDS)
        return await Determinism(
            subject, SETTINGS, plan, Sampling(12), exact=exact, run_id="r"
        ).run()

    return run


def failed_checks(report: SuiteReport) -> set[str]:
    return {check.name for check in report.checks if check.ok is False}


def verdicts(report: SuiteReport, phase: str) -> set[Verdict]:
    return {item.judgement.verdict for item in report.judged if item.phase == phase}


@pytest.mark.parametrize("exact", [False, True])
async def test_a_right_stack_passes(check: Any, store: FakeStore, exact: bool) -> None:
    """Stored, reset, loaded, equal: passed, with counters as proof and no check failed."""
    report = await check(FakeEngine(store=store), exact=exact)

    assert report.outcome == "passed"
    assert failed_checks(report) == set()
    assert report.served.share == 1.0
    assert report.noise_nats == 0.0


async def test_an_engine_alone_is_not_exercised(check: Any) -> None:
    """With kvkeep switched off all answers agree, and nothing is proven."""
    report = await check(FakeEngine())

    assert report.outcome == "not-exercised"
    assert not report.passed
    assert verdicts(report, "phase 1") == {Verdict.IDENTICAL}
    assert verdicts(report, "phase 2") == {Verdict.NOT_EXERCISED}


@pytest.mark.parametrize("exact", [False, True])
async def test_a_flipped_bit_is_corruption(check: Any, store: FakeStore, exact: bool) -> None:
    """KV that comes back with one bit flipped is corruption in the prompts it belongs to."""
    report = await check(FakeEngine(store=store, faults=Faults(flip_every=9)), exact=exact)

    assert report.outcome == "failed"
    assert Verdict.CORRUPTION in verdicts(report, "phase 2")
    assert verdicts(report, "phase 1") == {Verdict.IDENTICAL}


async def test_a_swapped_block_is_contamination(check: Any, store: FakeStore) -> None:
    """A block of another prompt makes the engine say that prompt's code word."""
    report = await check(FakeEngine(store=store, faults=Faults(swap=True)))

    assert report.outcome == "failed"
    assert Verdict.CONTAMINATION in verdicts(report, "phase 2")


async def test_noise_of_reuse_is_corruption_only_where_bits_are_promised(
    check: Any,
) -> None:
    """Reuse that moves logprobs as another order of additions does passes, except exactly."""
    loose = await check(FakeEngine(store=FakeStore(), reuse_noise_nats=0.03))
    strict = await check(FakeEngine(store=FakeStore(), reuse_noise_nats=0.03), exact=True)

    assert loose.outcome == "passed"
    assert sum(loose.cold_agreement.values()) > loose.cold_agreement["identical"]
    assert strict.outcome == "failed"
    assert Verdict.CORRUPTION in verdicts(strict, "phase 1")


async def test_noise_between_engine_and_outside_is_judged_by_ties(
    check: Any, store: FakeStore
) -> None:
    """Where loaded KV moves logprobs a little and kept KV does not, ties turn and it passes."""

    class Noisy(FakeEngine):
        def prefill(self, words: Any, salt: str = "") -> Any:
            blocks, local, external = super().prefill(words, salt)
            self.reuse_noise_nats = 0.03 if external else 0.0
            return blocks, local, external

    report = await check(Noisy(store=store))

    assert verdicts(report, "phase 2") == {Verdict.IDENTICAL, Verdict.NEAR_TIE}
    assert report.outcome == "passed"


@pytest.mark.parametrize(
    "faults", [Faults(empty_every=11), Faults(fail_every=11), Faults(cut_every=11)]
)
async def test_answers_that_fail_are_failures(check: Any, store: FakeStore, faults: Faults) -> None:
    """Empty, refused and broken answers fail the run, whichever phase they fall into."""
    report = await check(FakeEngine(store=store, faults=faults))

    assert report.outcome == "failed"
    assert any(item.judgement.verdict is Verdict.ERROR for item in report.judged)


async def test_a_reset_that_lies_is_caught(check: Any, store: FakeStore) -> None:
    """A reset that clears nothing fails, though it says it succeeded and answers agree."""
    report = await check(FakeEngine(store=store, faults=Faults(reset_lies=True)))

    assert report.outcome == "failed"
    assert "reset emptied the engine" in failed_checks(report)


async def test_a_reset_that_is_refused_fails_the_run(check: Any, store: FakeStore) -> None:
    """A reset that never succeeds ends the run as failed, and says what was cleared."""
    report = await check(FakeEngine(store=store, faults=Faults(reset_refusals=-1)))

    assert report.outcome == "failed"
    assert report.to_dict()["reset"]["cleared"]["engine"] == "nothing"
    assert "phase 2" not in {phase.name for phase in report.phases}


async def test_a_falling_counter_is_caught(check: Any, store: FakeStore) -> None:
    """Counters that go back prove nothing, and that is a failure."""
    report = await check(FakeEngine(store=store, faults=Faults(counters_fall=True)))

    assert "counters never fall" in failed_checks(report)
    assert report.outcome == "failed"


async def test_kv_of_an_earlier_run_is_not_taken_for_this_runs(
    check: Any, store: FakeStore
) -> None:
    """Salts make the first pass cold even on a stack that answered the same prompts before."""
    fake = FakeEngine(store=store)
    for prompt in make_plan(SETTINGS, load_words(), WORDS).warm_up:
        fake.prefill(prompt.text.split())

    assert (await check(fake)).outcome == "passed"


async def test_loads_during_the_first_pass_are_caught(check: Any, store: FakeStore) -> None:
    """A first pass that is served from outside was not cold, so the run fails."""

    class Unsalted(FakeEngine):
        def prefill(self, words: Any, salt: str = "") -> Any:
            return super().prefill(words)

    fake = Unsalted(store=store)
    await check(fake)
    fake.cache.clear()

    report = await check(fake)

    assert "first pass loads nothing" in failed_checks(report)


async def test_the_eviction_case_loads_again(check: Any, store: FakeStore) -> None:
    """On an engine with few blocks P1, P2, P1 makes P1 load from outside again."""
    small = FakeEngine(store=store, num_blocks=20)

    report = await check(FakeEngine(store=store), small=small)

    again = next(check for check in report.checks if check.name == "eviction: P1 loads again")
    assert again.ok
    assert report.outcome == "passed"


async def test_an_eviction_case_without_a_store_fails(check: Any, store: FakeStore) -> None:
    """A small engine that has to compute P1 anew fails the eviction case."""
    report = await check(FakeEngine(store=store), small=FakeEngine(num_blocks=20))

    assert "eviction: P1 loads again" in failed_checks(report)


async def test_a_whole_prompt_that_is_reused_is_caught(check: Any, store: FakeStore) -> None:
    """At least one token of a full hit is computed; an engine that says otherwise fails."""

    class Greedy(FakeEngine):
        def _chunks(self, asked: Any, words: Any, tokens: Any, cached_tokens: int) -> Any:
            return super()._chunks(asked, words, tokens, len(words) if cached_tokens else 0)

    report = await check(Greedy(store=store))

    assert "a token stays to compute" in failed_checks(report)


def test_the_plan_follows_the_intervals() -> None:
    """All control prompts every 10th iteration, a window in each, all random ones every 7th."""
    settings = CheckSettings(max_iterations=20)

    plan = make_plan(settings, load_words(), 50)

    kinds = [prompt.kind for prompt in plan.schedule]
    assert (kinds.count("control"), kinds.count("window"), kinds.count("random")) == (12, 20, 10)
    assert kinds[:7] == ["window"] * 7
    assert kinds[7:12] == ["random"] * 5
    assert len(plan.warm_up) == 31
    assert {prompt.prompt_id for prompt in plan.schedule} == {p.prompt_id for p in plan.warm_up}


def test_fresh_prompts_are_in_no_other_phase() -> None:
    """Fresh prompts were never asked before, and some are shorter than a block."""
    plan = make_plan(CheckSettings(max_iterations=20), load_words(), 50)

    asked = {prompt.text for prompt in plan.warm_up}
    assert not asked & {prompt.text for prompt in plan.fresh}
    assert min(len(prompt.text) for prompt in plan.fresh) < 10


def test_a_window_is_several_blocks_long() -> None:
    """Windows grow with the engine's blocks unless a person fixed their length."""
    settings = CheckSettings(word_count=200)

    assert fit_word_count(settings, 32, fixed=False) == 200
    assert fit_word_count(settings, 128, fixed=False) == 308
    assert fit_word_count(settings, 128, fixed=True) == 200
    assert fit_word_count(settings, None, fixed=False) == 200


async def test_the_report_holds_the_evidence(check: Any, store: FakeStore) -> None:
    """The JSON names every request with both answers, the fork and its best tokens."""
    report = (await check(FakeEngine(store=store, faults=Faults(flip_every=9)))).to_dict()

    wrong = next(r for r in report["requests"] if r["verdict"] == "corruption")
    assert report["schema"] == "kvkeep.check.determinism/1"
    assert wrong["reference"]["tokens"] != wrong["candidate"]["tokens"]
    assert len(wrong["reference_top2"]) == 2
    assert isinstance(wrong["position"], int)
    assert report["counts"]["corruption"] >= 1


def test_prompts_keep_their_own_code_word() -> None:
    """A window holds exactly the code word that counts as its own."""
    plan = make_plan(SETTINGS, load_words(), WORDS)

    windows: list[Prompt] = [prompt for prompt in plan.warm_up if prompt.kind == "window"]
    assert windows
    assert all(prompt.secrets[0] in prompt.text for prompt in windows)
