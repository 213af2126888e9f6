"""Determinism where one engine computes prompts and another the answers, through a router.

The replay of the aggregated suite, asked at the router. What the decode engine did not compute was
handed over, so its counters are the proof; the reset empties every engine of the pair.
"""

from kvkeep.validate.load import Sampling
from kvkeep.validate.runner import Watch
from kvkeep.validate.settings import Document
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.needs import PAIR
from kvkeep.validate.suite.replay import Replay
from kvkeep.validate.suites.determinism import fit_word_count, make_plan

NAME = "determinism-disaggregated"


async def run(context: Context) -> list[SuiteReport]:
    """One report per answer length."""
    return [await _run_one(context, max_tokens) for max_tokens in context.settings.max_tokens]


async def _run_one(context: Context, max_tokens: int) -> SuiteReport:
    subject, settings = context.subject, context.settings
    report = context.new_report(NAME, "cache-reset", max_tokens)
    block_tokens = subject.capabilities.block_tokens
    word_count = fit_word_count(settings, block_tokens, fixed="word_count" in context.named)
    plan = make_plan(settings, context.words, word_count)
    watch = Watch(subject.engine, subject.daemon, front=subject.front)
    replay = Replay(report, plan.warm_up, progress=context.progress, watch=watch)
    replay.resets = [*subject.prefill, *subject.decode]
    report.sampling = Sampling(max_tokens, settings.seed)
    first, second = await replay.measure_noise(plan.noise)
    warm_up = await replay.phase("warm-up", plan.warm_up)
    handed = warm_up.delta.external_hit_tokens
    report.check(
        "prompts are handed over",
        handed > 0,
        f"{handed} prompt tokens came to the decode engine from outside in the warm-up",
        gate=True,
    )
    phase_1 = await replay.phase("phase 1", plan.schedule)
    if not (await replay.reset()).ok:
        return report
    phase_2 = await replay.phase("phase 2", plan.schedule)
    if len(subject.decode) == 1:
        replay.check_served(phase_2)
    else:
        # Only one engine's counters are read, and the router spreads requests over several.
        report.check("served share", None, f"{len(subject.decode)} decode engines", gate=False)
    replay.judge_usable(first, second, warm_up)
    replay.judge_replay(warm_up, phase_1, phase_2)
    replay.check_last_token(phase_1, phase_2)
    replay.check_counters()
    return report


SUITE = Suite(
    name=NAME,
    title="Asks through a router before prefill and decode engines, resets all, and asks again.",
    proves="Prompts computed on one engine and answered on another give the same answers again.",
    document=Document.DETERMINISM,
    run=run,
    aliases=("test_determinism_disagg",),
    needs=(PAIR,),
    needs_router=True,
    needs_pair=True,
    small_s=120.0,
)
