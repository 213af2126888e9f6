"""Determinism across a cache reset, aggregated: one engine that prefills and decodes.

The replay of `kvkeep.validate.suite.replay` over control, window and random prompts, then fresh
prompts that nobody stored, and the eviction case where the stack has a small engine.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import servable_of_one
from kvkeep.validate.load import Sampling
from kvkeep.validate.prompts import control_prompts, documents, random_prompts, window_prompts
from kvkeep.validate.runner import Phase, Progress, Watch, median_ttft_s, no_progress
from kvkeep.validate.settings import CheckSettings, Document
from kvkeep.validate.subject import Subject
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.replay import NOISE_PROMPTS_MAX, Replay

NAME = "determinism"
FRESH_PROMPTS = 3
FRESH_TTFT_RATIO_MAX = 1.5
FRESH_TTFT_SLACK_S = 0.1
"""A prompt nobody stored may not wait for a transfer. The slack covers a busy machine."""
ALIKE_TOKENS_MAX = 64
"""Tokens that fresh prompts may share with stored ones: the system prompt and the opening."""
WINDOW_BLOCKS_MIN = 4
WORDS_PER_TOKEN = 0.6
"""Lower bound for this text, so that windows hold at least `WINDOW_BLOCKS_MIN` blocks."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked in which order."""

    warm_up: tuple[Prompt, ...]
    """Every prompt once."""
    schedule: tuple[Prompt, ...]
    """The iterations of a phase, flattened."""
    noise: tuple[Prompt, ...]
    """Asked twice, cold."""
    fresh: tuple[Prompt, ...]
    """Never asked before and, some, shorter than a block."""


def fit_word_count(settings: CheckSettings, block_tokens: int | None, *, fixed: bool) -> int:
    """Words of a window: those asked for, or more where that would be hardly a block.

    Args:
        settings: The run's.
        block_tokens: The engine's, or None if unknown.
        fixed: A person named the word count, so it stays.
    """
    if fixed or block_tokens is None:
        return settings.word_count
    least = int(WINDOW_BLOCKS_MIN * block_tokens * WORDS_PER_TOKEN) + 1
    return max(settings.word_count, least)


def make_plan(settings: CheckSettings, words: Sequence[str], word_count: int) -> Plan:
    """Lay out a run: the same for the same settings and text."""
    every = settings.shakespeare_interval
    windows = window_prompts(
        words, max(1, settings.max_iterations // every), word_count, settings.seed
    )
    control, random = control_prompts(), random_prompts()
    schedule: list[Prompt] = []
    upcoming = iter(windows)
    for iteration in range(1, settings.max_iterations + 1):
        if iteration % settings.control_interval == 0:
            schedule += control
        if iteration % every == 0:
            schedule.append(next(upcoming))
        if iteration % settings.random_interval == 0:
            schedule += random
    distinct = tuple({prompt.prompt_id: prompt for prompt in schedule}.values())
    mixed = itertools.zip_longest(windows[:5], control[:2], random[:1])
    noise = [prompt for row in mixed for prompt in row if prompt is not None]
    fresh = [
        document.prompt()
        for document in documents(FRESH_PROMPTS, word_count, settings.seed + 1, words=words)
    ]
    tiny = [Prompt(f"tiny-{i + 1}", text, "tiny") for i, text in enumerate(("Hi.", "Why?"))]
    return Plan(distinct, tuple(schedule), tuple(noise[:NOISE_PROMPTS_MAX]), (*fresh, *tiny))


class Determinism:
    """One run; `run` may be called once."""

    def __init__(
        self,
        subject: Subject,
        settings: CheckSettings,
        plan: Plan,
        sampling: Sampling,
        *,
        exact: bool,
        run_id: str,
        progress: Progress = no_progress,
    ) -> None:
        """Prepare a run; nothing is sent.

        Args:
            subject: Probed endpoints.
            settings: For the report.
            plan: What is asked.
            sampling: Length and seed of answers.
            exact: Any difference between two answers to one prompt is corruption.
            run_id: Salts every request, so that no earlier run's KV is found; unique per run.
            progress: Told about every answer.
        """
        self._plan = plan
        self.report = SuiteReport(NAME, "cache-reset", run_id, exact, sampling, settings, subject)
        self._replay = Replay(self.report, (*plan.warm_up, *plan.fresh), progress=progress)

    async def run(self) -> SuiteReport:
        """Run all phases and judge them.

        A reset that fails ends the run early; the report then says so and has failed.

        Raises:
            UnavailableError: The daemon's counters can't be read.
        """
        replay, plan = self._replay, self._plan
        first, second = await replay.measure_noise(plan.noise)
        warm_up = await replay.phase("warm-up", plan.warm_up)
        phase_1 = await replay.phase("phase 1", plan.schedule)
        if not (await replay.reset()).ok:
            return self.report
        phase_2 = await replay.phase("phase 2", plan.schedule)
        fresh = await replay.phase("fresh", plan.fresh)
        replay.check_served(phase_2)
        replay.judge_usable(first, second, warm_up, fresh)
        replay.judge_replay(warm_up, phase_1, phase_2)
        if self.report.exact:
            replay.judge_cold(first, second, warm_up)
        replay.check_tiers(warm_up, phase_2)
        self._check_fresh(first, fresh)
        replay.check_last_token(phase_1, phase_2)
        if self.report.subject.small is not None:
            await self._run_eviction(warm_up)
        replay.check_counters()
        return self.report

    def _check_fresh(self, cold: Phase, fresh: Phase) -> None:
        """New prompts and prompts shorter than a block have nothing to wait for."""
        block_tokens = self.report.subject.capabilities.block_tokens
        external = fresh.delta.external_hit_tokens
        # A system prompt and the opening up to the code word are alike in all prompts.
        allowed = max(block_tokens or 0, ALIKE_TOKENS_MAX) * len(fresh.prompts)
        self.report.check(
            "unique prompts load nothing", external <= allowed, f"{external} tokens from outside"
        )
        for kind, against in (("document", "window"), ("tiny", "control")):
            ours = median_ttft_s(_of_kind(fresh, kind))
            theirs = median_ttft_s(_of_kind(cold, against))
            if ours is None or theirs is None:
                continue
            limit_s = theirs * FRESH_TTFT_RATIO_MAX + FRESH_TTFT_SLACK_S
            self.report.check(
                f"{'unique' if kind == 'document' else 'sub-block'} prompts never wait",
                ours <= limit_s,
                f"first token after {ours:.3f} s; computed {theirs:.3f} s, limit {limit_s:.3f} s",
            )

    async def _run_eviction(self, warm_up: Phase) -> None:
        """P1, P2, P1 on an engine that holds only one of them: P1 has to load again."""
        subject = self.report.subject
        capabilities = subject.small_capabilities
        if subject.small is None or capabilities is None:
            return
        block_tokens, num_blocks = capabilities.block_tokens, capabilities.num_blocks
        if block_tokens is None or num_blocks is None:
            self.report.check("eviction", None, "the small engine does not say how large it is")
            return
        watch = Watch(subject.small, subject.daemon)
        # Each takes more than half of the engine, so that it holds one of them only.
        num_words = max(8, int(0.6 * num_blocks * block_tokens / _tokens_per_word(warm_up)))
        one, two = (d.prompt() for d in documents(2, num_words, self.report.settings.seed + 2))
        self._replay.know((one, two))
        passes = [
            await self._replay.phase(f"eviction {name}", [prompt], watch=watch)
            for name, prompt in (("P1", one), ("P2", two), ("P1 again", one))
        ]
        self._replay.judge_usable(*passes)
        # The opening that all prompts share may come from outside each time; P1 itself must too.
        shared = passes[0].delta.external_hit_tokens
        external = passes[2].delta.external_hit_tokens
        could = servable_of_one(passes[2].answers[0].prompt_tokens or 0, block_tokens)
        self.report.check(
            "eviction: P1 loads again",
            external > shared,
            f"{external} of {could} tokens from outside; {shared} the first time",
        )
        if self.report.exact:
            self.report.judged.append(self._replay.judged(passes[2], 0, passes[0].answers[0]))
        self._replay.check_counters(watch, "eviction: ")


def _of_kind(phase: Phase, kind: str) -> list[Answer]:
    pairs = zip(phase.prompts, phase.answers, strict=True)
    return [answer for prompt, answer in pairs if prompt.kind == kind]


def _tokens_per_word(phase: Phase) -> float:
    """How this model's tokenizer cuts the phase's longest prompt; 1 or more."""
    pairs = zip(phase.prompts, phase.answers, strict=True)
    tokens, words = max((a.prompt_tokens or 0, len(p.text.split())) for p, a in pairs)
    return max(1.0, tokens / max(1, words))


async def run(context: Context) -> list[SuiteReport]:
    """One report per answer length."""
    settings, subject = context.settings, context.subject
    block_tokens = subject.capabilities.block_tokens
    word_count = fit_word_count(settings, block_tokens, fixed="word_count" in context.named)
    reports = []
    for max_tokens in settings.max_tokens:
        suite_run = Determinism(
            subject,
            settings,
            make_plan(settings, context.words, word_count),
            Sampling(max_tokens, settings.seed),
            exact=context.exact,
            run_id=context.new_run_id(),
            progress=context.progress,
        )
        reports.append(await suite_run.run())
    return reports


SUITE = Suite(
    name=NAME,
    title="Asks, resets the engine's cache, and asks again.",
    proves="KV that comes back from outside the engine gives the answers of the KV that was there.",
    document=Document.DETERMINISM,
    run=run,
    groups=("quick",),
    aliases=("test_determinism", "test_determinism_agg", "test_determinism_with_cache_reset"),
)
