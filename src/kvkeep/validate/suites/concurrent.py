"""Determinism with several requests in flight: across a reset, and while a flood evicts blocks.

Requests at once share steps of the engine, so that sums are added in another order each time: the
noise floor is measured with as many in flight, and under the same flood.
"""

from collections.abc import Sequence

from kvkeep.validate.answer import Prompt
from kvkeep.validate.runner import Watch
from kvkeep.validate.settings import Document
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.flood import Flood
from kvkeep.validate.suite.instructions import instruction_prompts
from kvkeep.validate.suite.replay import Replay
from kvkeep.validate.suite.sizes import make_cutter

NAME = "determinism-concurrent"
BLOCKS_PER_PROMPT = 3
"""Prompts of hardly a block would prove nothing."""
TOKENS_LEAST = 96
NOISE_ROUNDS = 2
"""Noise prompts per request in flight, so that steps are as full as later."""
NOISE_MOST = 32
_LESS_MEMORY = "give it less memory (kv_cache_bytes) or ask for more prompts to push everything out"


async def run(context: Context) -> list[SuiteReport]:
    """One report per number of prompts, workers, answer length, with and without a flood."""
    settings, reports = context.settings, []
    for num_prompts in settings.ifeval_prompts:
        for workers in settings.concurrent_requests:
            for max_tokens in settings.concurrent_max_tokens:
                for is_flooded in (False, True):
                    mode = f"{workers} in flight{', flooded' if is_flooded else ''}"
                    report = context.new_report(NAME, mode, max_tokens)
                    prompts = await make_prompts(context, report, num_prompts)
                    await run_level(context, report, prompts, workers, is_flooded=is_flooded)
                    reports.append(report)
    return reports


async def make_prompts(context: Context, report: SuiteReport, num: int) -> list[Prompt]:
    """Prompts of a few blocks each; says in the report where they came from."""
    cutter = await make_cutter(context)
    block_tokens = context.subject.capabilities.block_tokens or 0
    wanted = max(TOKENS_LEAST, BLOCKS_PER_PROMPT * block_tokens)
    num_words = int(cutter.fit(report, "prompt_tokens", wanted) / cutter.tokens_per_word)
    settings = context.settings
    prompts, report.data = instruction_prompts(
        num, num_words, settings.seed, context.words, settings.ifeval_file
    )
    return prompts


async def run_level(
    context: Context,
    report: SuiteReport,
    prompts: Sequence[Prompt],
    workers: int,
    *,
    is_flooded: bool,
) -> None:
    """Warm up, ask, reset, ask again, and judge, with so many requests in flight.

    The first phase is never flooded: it is the reference. Under a flood the second one has to
    bring back what the flood pushes out.
    """
    subject = context.subject
    flood = Flood(context, await make_cutter(context), subject.engine)
    calm = Watch(subject.engine, subject.daemon)
    busy = Watch(subject.engine, subject.daemon, beside=flood.open) if is_flooded else calm
    replay = Replay(report, prompts, in_flight=workers, progress=context.progress, watch=calm)
    noise = prompts[: min(NOISE_MOST, max(8, NOISE_ROUNDS * workers))]
    first, second = await replay.measure_noise(noise, busy)
    warm_up = await replay.phase("warm-up", prompts)
    phase_1 = await replay.phase("phase 1", prompts)
    if not (await replay.reset()).ok:
        return
    phase_2 = await replay.phase("phase 2", prompts, watch=busy)
    replay.check_served(phase_2)
    replay.judge_usable(first, second, warm_up)
    replay.judge_replay(warm_up, phase_1, phase_2)
    replay.check_tiers(warm_up, phase_2)
    replay.check_last_token(phase_1, phase_2)
    replay.check_counters()
    report.numbers |= {"in_flight": workers, "requests_per_s": len(prompts) / phase_2.wall_s}
    if is_flooded:
        note_flood(report, flood)


def note_flood(report: SuiteReport, flood: Flood) -> None:
    """Say how much was pushed through the engine beside the suite's requests."""
    capabilities = report.subject.capabilities
    tokens = (capabilities.num_blocks or 0) * (capabilities.block_tokens or 0)
    report.numbers |= {"flood_requests": flood.num_requests, "flood_tokens": flood.num_tokens}
    report.check(
        "flood ran beside",
        flood.num_requests > 0,
        f"{flood.num_requests} requests of {flood.num_tokens} prompt tokens in all",
        gate=True,
    )
    is_filled = 0 < tokens <= flood.num_tokens
    report.check(
        "flood fills the engine",
        is_filled or None,
        f"{flood.num_tokens} tokens through an engine of {tokens or 'unknown many'}"
        + ("" if is_filled else f"; {_LESS_MEMORY}"),
    )


SUITE = Suite(
    name=NAME,
    title="Asks several prompts at once, resets, and asks again, also beside a flood of others.",
    proves="Reuse gives right answers where requests share steps and blocks are pushed out.",
    document=Document.DETERMINISM,
    run=run,
    aliases=("test_concurrent_determinism_with_ifeval",),
    groups=("quick",),
    settings=("ifeval_file",),
    small_s=180.0,
)
