"""Determinism across a cache reset, aggregated: one engine that prefills and decodes.

    A/A noise -> warm-up -> phase 1 -> reset -> phase 2 -> fresh prompts [-> eviction] -> verdicts

Warm-up fills the cache under test, phase 1 is answered from the engine's own prefix cache, and
after the reset phase 2 has to come from outside. Each answer of phase 2 is judged against phase
1's; where phase 1 was itself served from outside, and in the exact mode, against the computed
answers of the warm-up.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import find_backward, servable_of_one
from kvkeep.validate.load import ResetReport, Sampling
from kvkeep.validate.prompts import control_prompts, documents, random_prompts, window_prompts
from kvkeep.validate.runner import (
    Check,
    Judged,
    Phase,
    Progress,
    Served,
    Watch,
    count_verdicts,
    median_ttft_s,
    no_progress,
    run_phase,
    served_in,
)
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subject import Subject
from kvkeep.validate.verdict import (
    PASSING,
    Verdict,
    judge,
    noise_floor,
    without_exercise,
)

SCHEMA = "kvkeep.check.determinism/1"
NOISE_PROMPTS_MAX = 8
"""Prompts asked twice, cold, for the noise floor."""
NOISE_NATS_MAX = 1.0
"""A stack whose cold runs lie further apart can't be judged by comparing answers."""
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


@dataclass(slots=True)
class DeterminismReport:
    """Everything a run found."""

    run_id: str
    exact: bool
    sampling: Sampling
    settings: CheckSettings
    subject: Subject
    noise_nats: float = 0.0
    reset: ResetReport | None = None
    served: Served | None = None
    phases: list[Phase] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    cold_agreement: dict[str, int] = field(default_factory=dict)
    """Verdicts of phase 2 against computed answers; for information unless exact."""

    @property
    def outcome(self) -> str:
        """``passed``, ``failed`` or ``not-exercised``; a failure outweighs the rest."""
        verdicts = {item.judgement.verdict for item in self.judged}
        wrong = verdicts - PASSING - {Verdict.NOT_EXERCISED}
        if wrong or any(check.ok is False and not check.gate for check in self.checks):
            return "failed"
        idle = any(check.ok is not True for check in self.checks if check.gate)
        if idle or Verdict.NOT_EXERCISED in verdicts or not self.judged:
            return "not-exercised"
        return "passed"

    @property
    def passed(self) -> bool:
        """True only if every promise was shown to hold."""
        return self.outcome == "passed"

    def to_dict(self) -> dict[str, Any]:
        """JSON form, documented in docs/check.md."""
        return {
            "schema": SCHEMA,
            "suite": "determinism",
            "mode": "cache-reset",
            "outcome": self.outcome,
            "passed": self.passed,
            "run_id": self.run_id,
            "exact": self.exact,
            "sampling": {"max_tokens": self.sampling.max_tokens, "seed": self.sampling.seed},
            "settings": self.settings.to_dict(),
            "subject": {
                "url": self.subject.engine.url,
                "daemon_url": self.subject.daemon.url if self.subject.daemon else None,
                "capabilities": self.subject.capabilities.to_dict(),
            },
            "noise_nats": self.noise_nats,
            "reset": self.reset.to_dict() if self.reset else None,
            "served": self.served.to_dict() if self.served else None,
            "phases": [phase.to_dict() for phase in self.phases],
            "checks": [check.to_dict() for check in self.checks],
            "counts": count_verdicts(self.judged),
            "cold_agreement": self.cold_agreement,
            "requests": [item.to_dict() for item in self.judged],
        }


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
        self._progress = progress
        self._watch = Watch(subject.engine, subject.daemon)
        self._secrets = [s for p in (*plan.warm_up, *plan.fresh) for s in p.secrets]
        self.report = DeterminismReport(run_id, exact, sampling, settings, subject)

    async def run(self) -> DeterminismReport:
        """Run all phases and judge them.

        A reset that fails ends the run early; the report then says so and has failed.

        Raises:
            UnavailableError: The daemon's counters can't be read.
        """
        first, second = await self._measure_noise()
        warm_up = await self._phase("warm-up", self._plan.warm_up)
        phase_1 = await self._phase("phase 1", self._plan.schedule)
        self.report.reset = await self._watch.engine.reset_prefix_cache()
        reset = self.report.reset
        self._check("reset", reset.ok, f"{reset.detail} after {reset.attempts} attempt(s)")
        if not reset.ok:
            return self.report
        phase_2 = await self._phase("phase 2", self._plan.schedule)
        fresh = await self._phase("fresh", self._plan.fresh)
        self._check_served(phase_2)
        self._judge_usable(first, second, warm_up, fresh)
        self._judge_replay(warm_up, phase_1, phase_2)
        if self.report.exact:
            self._judge_cold(first, second, warm_up)
        self._check_tiers(warm_up, phase_2)
        self._check_fresh(first, fresh)
        self._check_last_token(phase_1, phase_2)
        if self.report.subject.small is not None:
            await self._run_eviction(warm_up)
        fallen = find_backward(self._watch.readings)
        self._check("counters never fall", not fallen, ", ".join(fallen) or "all rose or stood")
        return self.report

    async def _phase(
        self,
        name: str,
        prompts: Sequence[Prompt],
        *,
        cold: bool = False,
        watch: Watch | None = None,
    ) -> Phase:
        run_id = self.report.run_id

        def salt_of(i: int, prompt: Prompt) -> str:
            return f"{run_id}-{name}-{i}" if cold else run_id

        phase = await run_phase(
            name,
            watch or self._watch,
            prompts,
            self.report.sampling,
            salt_of=salt_of,
            progress=self._progress,
        )
        self.report.phases.append(phase)
        return phase

    def _check(self, name: str, ok: bool | None, detail: str, *, gate: bool = False) -> None:
        self.report.checks.append(Check(name, ok, detail, gate))

    async def _measure_noise(self) -> tuple[Phase, Phase]:
        """Ask some prompts twice with salts of their own: how far two computed answers differ."""
        first = await self._phase("cold A", self._plan.noise, cold=True)
        second = await self._phase("cold B", self._plan.noise, cold=True)
        self.report.noise_nats = noise_floor(zip(first.answers, second.answers, strict=True))
        noise_nats = self.report.noise_nats
        self._check(
            "noise floor",
            noise_nats <= NOISE_NATS_MAX,
            f"two cold runs lie {noise_nats:.4f} nat apart; {NOISE_NATS_MAX} allowed",
        )
        return first, second

    def _judged(
        self, phase: Phase, i: int, reference: Answer, *, exact: bool | None = None
    ) -> Judged:
        prompt, answer = phase.prompts[i], phase.answers[i]
        judgement = judge(
            reference,
            answer,
            noise_nats=self.report.noise_nats,
            exact=self.report.exact if exact is None else exact,
            own_secrets=prompt.secrets,
            known_secrets=self._secrets,
        )
        return Judged(phase.name, prompt, i, judgement, reference, answer)

    def _judge_usable(self, *phases: Phase) -> None:
        """Report failed, empty and contaminated answers of phases that have no reference."""
        for phase in phases:
            for i, answer in enumerate(phase.answers):
                item = self._judged(phase, i, answer, exact=False)
                if item.judgement.verdict not in PASSING:
                    self.report.judged.append(item)

    def _judge_replay(self, warm_up: Phase, phase_1: Phase, phase_2: Phase) -> None:
        computed = dict(zip((p.prompt_id for p in warm_up.prompts), warm_up.answers, strict=True))
        reused_1 = phase_1.delta.external_hit_tokens > 0
        first_seen: dict[str, Answer] = {}
        cold: list[Judged] = []
        served = self.report.served
        idle = served.why_not_exercised() if served else "Nothing is known about the replay."
        for i, prompt in enumerate(phase_1.prompts):
            before = first_seen.setdefault(prompt.prompt_id, phase_1.answers[i])
            use_cold = self.report.exact or reused_1
            oracle = computed[prompt.prompt_id]
            self.report.judged.append(self._judged(phase_1, i, oracle if use_cold else before))
            reference = oracle if use_cold else phase_1.answers[i]
            item = self._judged(phase_2, i, reference)
            if idle is not None:
                withdrawn = without_exercise(item.judgement, idle)
                item = Judged(item.phase, prompt, i, withdrawn, reference, item.candidate)
            self.report.judged.append(item)
            cold.append(self._judged(phase_2, i, oracle))
        self.report.cold_agreement = count_verdicts(cold)

    def _judge_cold(self, first: Phase, second: Phase, warm_up: Phase) -> None:
        """In the exact mode computed answers agree among themselves, whatever their salt."""
        computed = dict(zip((p.prompt_id for p in warm_up.prompts), warm_up.answers, strict=True))
        for i, prompt in enumerate(first.prompts):
            self.report.judged.append(self._judged(second, i, first.answers[i]))
            if prompt.prompt_id in computed:
                self.report.judged.append(self._judged(first, i, computed[prompt.prompt_id]))

    def _check_served(self, phase_2: Phase) -> None:
        served = served_in(phase_2, self.report.subject.capabilities.block_tokens)
        self.report.served = served
        reason = served.why_not_exercised()
        detail = (
            f"{served.external_tokens} of {served.servable_external_tokens} servable prompt tokens "
            f"from outside the engine; {served.local_tokens} from the engine itself"
        )
        self._check("served share", reason is None, reason or detail, gate=True)
        if served.servable_local_tokens is not None:
            self._check(
                "reset emptied the engine",
                served.local_tokens <= served.servable_local_tokens,
                f"{served.local_tokens} tokens from the engine itself after the reset; repeats "
                f"within the replay explain {served.servable_local_tokens}",
            )

    def _check_tiers(self, warm_up: Phase, phase_2: Phase) -> None:
        """First pass: stored, nothing loaded. After the reset: loaded."""
        fits = self._fits_engine(warm_up)
        external = warm_up.delta.external_hit_tokens
        self._check(
            "first pass loads nothing",
            external == 0 if fits else None,
            f"{external} tokens from outside during the warm-up"
            + ("" if fits else "; the engine's memory is too small for all prompts"),
        )
        if self.report.subject.daemon is None:
            self._check("tier counters", None, "no daemon named (--daemon-metrics)")
            return
        stored = warm_up.delta.daemon.get("blocks_stored", 0)
        early = warm_up.delta.daemon.get("blocks_loaded", 0)
        loaded = phase_2.delta.daemon.get("blocks_loaded", 0)
        self._check(
            "first pass stores", stored > 0, f"{stored} blocks stored in the warm-up", gate=True
        )
        if fits:
            self._check("first pass: no block loaded", early == 0, f"{early} blocks loaded")
        self._check("after reset: loads", loaded > 0, f"{loaded} blocks loaded", gate=True)
        for name in ("device_to_host", "host_to_device"):
            phase = warm_up if name == "device_to_host" else phase_2
            if name in phase.delta.daemon:
                moved = phase.delta.daemon[name]
                self._check(f"{name} moves", moved > 0, f"{moved} in {phase.name}", gate=True)
        failures = phase_2.delta.daemon.get("load_failures")
        if failures is not None:
            self._check("no load failed", failures == 0, f"{failures} failed loads in phase 2")

    def _fits_engine(self, warm_up: Phase) -> bool:
        """Whether all prompts fit the engine at once, so that it has no reason to load early."""
        capabilities = self.report.subject.capabilities
        block_tokens, num_blocks = capabilities.block_tokens, capabilities.num_blocks
        if block_tokens is None or num_blocks is None:
            return True
        max_tokens = self.report.sampling.max_tokens
        asked = [(a.prompt_tokens or 0) + max_tokens for a in warm_up.answers]
        return sum(-(-tokens // block_tokens) for tokens in asked) < num_blocks

    def _check_fresh(self, cold: Phase, fresh: Phase) -> None:
        """New prompts and prompts shorter than a block have nothing to wait for."""
        block_tokens = self.report.subject.capabilities.block_tokens
        external = fresh.delta.external_hit_tokens
        # A system prompt and the opening up to the code word are alike in all prompts.
        allowed = max(block_tokens or 0, ALIKE_TOKENS_MAX) * len(fresh.prompts)
        self._check(
            "unique prompts load nothing", external <= allowed, f"{external} tokens from outside"
        )
        for kind, against in (("document", "window"), ("tiny", "control")):
            ours = median_ttft_s(_of_kind(fresh, kind))
            theirs = median_ttft_s(_of_kind(cold, against))
            if ours is None or theirs is None:
                continue
            limit_s = theirs * FRESH_TTFT_RATIO_MAX + FRESH_TTFT_SLACK_S
            self._check(
                f"{'unique' if kind == 'document' else 'sub-block'} prompts never wait",
                ours <= limit_s,
                f"first token after {ours:.3f} s; computed {theirs:.3f} s, limit {limit_s:.3f} s",
            )

    def _check_last_token(self, *phases: Phase) -> None:
        """A full hit still computes at least one token."""
        known = [
            answer
            for phase in phases
            for answer in phase.answers
            if answer.cached_tokens is not None and answer.prompt_tokens is not None
        ]
        if not known:
            return
        whole = [a for a in known if (a.cached_tokens or 0) >= (a.prompt_tokens or 0)]
        self._check(
            "a token stays to compute",
            not whole,
            f"{len(whole)} of {len(known)} answers reused the whole prompt",
        )

    async def _run_eviction(self, warm_up: Phase) -> None:
        """P1, P2, P1 on an engine that holds only one of them: P1 has to load again."""
        subject = self.report.subject
        capabilities = subject.small_capabilities
        if subject.small is None or capabilities is None:
            return
        block_tokens, num_blocks = capabilities.block_tokens, capabilities.num_blocks
        if block_tokens is None or num_blocks is None:
            self._check("eviction", None, "the small engine does not say how large it is")
            return
        watch = Watch(subject.small, subject.daemon)
        # Each takes more than half of the engine, so that it holds one of them only.
        num_words = max(8, int(0.6 * num_blocks * block_tokens / _tokens_per_word(warm_up)))
        one, two = (d.prompt() for d in documents(2, num_words, self.report.settings.seed + 2))
        self._secrets += [*one.secrets, *two.secrets]
        passes = [
            await self._phase(f"eviction {name}", [prompt], watch=watch)
            for name, prompt in (("P1", one), ("P2", two), ("P1 again", one))
        ]
        self._judge_usable(*passes)
        # The opening that all prompts share may come from outside each time; P1 itself must too.
        shared = passes[0].delta.external_hit_tokens
        external = passes[2].delta.external_hit_tokens
        could = servable_of_one(passes[2].answers[0].prompt_tokens or 0, block_tokens)
        self._check(
            "eviction: P1 loads again",
            external > shared,
            f"{external} of {could} tokens from outside; {shared} the first time",
        )
        if self.report.exact:
            self.report.judged.append(self._judged(passes[2], 0, passes[0].answers[0]))
        fallen = find_backward(watch.readings)
        self._check("eviction: counters never fall", not fallen, ", ".join(fallen) or "all rose")


def _of_kind(phase: Phase, kind: str) -> list[Answer]:
    pairs = zip(phase.prompts, phase.answers, strict=True)
    return [answer for prompt, answer in pairs if prompt.kind == kind]


def _tokens_per_word(phase: Phase) -> float:
    """How this model's tokenizer cuts the phase's longest prompt; 1 or more."""
    pairs = zip(phase.prompts, phase.answers, strict=True)
    tokens, words = max((a.prompt_tokens or 0, len(p.text.split())) for p, a in pairs)
    return max(1.0, tokens / max(1, words))
