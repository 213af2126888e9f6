"""Asks the same again after a reset, and judges what was reused against what was computed.

    A/A noise -> warm-up -> phase 1 -> reset -> phase 2 -> verdicts

Warm-up fills the cache under test, phase 1 is answered from the engine's own prefix cache, and
after the reset phase 2 has to come from outside. Each answer of phase 2 is judged against phase
1's; where phase 1 was itself served from outside, and in the exact mode, against the computed
answers of the warm-up.
"""

from collections.abc import Sequence

from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import find_backward
from kvkeep.validate.load import Endpoint, ResetReport
from kvkeep.validate.runner import (
    Judged,
    Phase,
    Progress,
    Watch,
    count_verdicts,
    no_progress,
    run_phase,
    served_in,
)
from kvkeep.validate.suite.base import SuiteReport
from kvkeep.validate.verdict import PASSING, judge, noise_floor, without_exercise

NOISE_PROMPTS_MAX = 8
"""Prompts asked twice, cold, for the noise floor."""
NOISE_NATS_MAX = 1.0
"""A stack whose cold runs lie further apart can't be judged by comparing answers."""


class Replay:
    """The phases of one run, filling its report; each phase may be asked for once."""

    def __init__(
        self,
        report: SuiteReport,
        prompts: Sequence[Prompt],
        *,
        in_flight: int = 1,
        progress: Progress = no_progress,
        watch: Watch | None = None,
    ) -> None:
        """Prepare; nothing is sent.

        Args:
            report: Filled by every method; its ``run_id`` salts every request, so that no earlier
                run's KV is found.
            prompts: All that will be asked: their code words are looked for in every answer.
            in_flight: Requests under way at a time.
            progress: Told about every answer.
            watch: Who is asked and counted, if not the subject's engine and daemon.
        """
        subject = report.subject
        self.report = report
        self.watch = watch or Watch(subject.engine, subject.daemon)
        self.resets: list[Endpoint] = [self.watch.engine]
        """Engines whose own caches a reset empties."""
        self._in_flight, self._progress = in_flight, progress
        self._secrets = [secret for prompt in prompts for secret in prompt.secrets]

    def know(self, prompts: Sequence[Prompt]) -> None:
        """Look for these prompts' code words too."""
        self._secrets += [secret for prompt in prompts for secret in prompt.secrets]

    async def phase(
        self,
        name: str,
        prompts: Sequence[Prompt],
        *,
        cold: bool = False,
        watch: Watch | None = None,
        in_flight: int | None = None,
    ) -> Phase:
        """Ask prompts; ``cold`` gives each request a salt of its own, so that it is computed."""
        run_id = self.report.run_id

        def salt_of(i: int, prompt: Prompt) -> str:
            return f"{run_id}-{name}-{i}" if cold else run_id

        phase = await run_phase(
            name,
            watch or self.watch,
            prompts,
            self.report.sampling,
            salt_of=salt_of,
            progress=self._progress,
            in_flight=in_flight or self._in_flight,
        )
        self.report.phases.append(phase)
        return phase

    async def measure_noise(
        self, prompts: Sequence[Prompt], busy: Watch | None = None
    ) -> tuple[Phase, Phase]:
        """Ask some prompts twice with salts of their own: how far two computed answers differ.

        Args:
            prompts: What is asked.
            busy: Who is asked the second time, if a later phase runs under another load.
        """
        first = await self.phase("cold A", prompts, cold=True)
        second = await self.phase("cold B", prompts, cold=True, watch=busy)
        self.note_noise(first, second)
        return first, second

    def note_noise(self, first: Phase, *others: Phase) -> None:
        """Take computed phases over the same prompts for the noise floor."""
        noise_nats = max(
            noise_floor(zip(first.answers, other.answers, strict=True)) for other in others
        )
        self.report.noise_nats = noise_nats
        self.report.check(
            "noise floor",
            noise_nats <= NOISE_NATS_MAX,
            f"two cold runs lie {noise_nats:.4f} nat apart; {NOISE_NATS_MAX} allowed",
        )

    async def reset(self) -> ResetReport:
        """Empty the engines' own prefix caches, and note whether they agreed."""
        reports = [await endpoint.reset_prefix_cache() for endpoint in self.resets]
        reset = next((report for report in reports if not report.ok), reports[0])
        self.report.reset = reset
        self.report.check("reset", reset.ok, f"{reset.detail} after {reset.attempts} attempt(s)")
        return reset

    def judged(
        self, phase: Phase, i: int, reference: Answer, *, exact: bool | None = None
    ) -> Judged:
        """Judge the i-th answer of a phase."""
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

    def judge_usable(self, *phases: Phase) -> None:
        """Report failed, empty and contaminated answers of phases that have no reference."""
        for phase in phases:
            for i, answer in enumerate(phase.answers):
                item = self.judged(phase, i, answer, exact=False)
                if item.judgement.verdict not in PASSING:
                    self.report.judged.append(item)

    def judge_replay(self, warm_up: Phase, phase_1: Phase, phase_2: Phase) -> None:
        """Judge both phases, whose prompts are the same in the same order."""
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
            self.report.judged.append(self.judged(phase_1, i, oracle if use_cold else before))
            reference = oracle if use_cold else phase_1.answers[i]
            item = self.judged(phase_2, i, reference)
            if idle is not None:
                withdrawn = without_exercise(item.judgement, idle)
                item = Judged(item.phase, prompt, i, withdrawn, reference, item.candidate)
            self.report.judged.append(item)
            cold.append(self.judged(phase_2, i, oracle))
        self.report.cold_agreement = count_verdicts(cold)

    def judge_cold(self, first: Phase, second: Phase, warm_up: Phase) -> None:
        """In the exact mode computed answers agree among themselves, whatever their salt."""
        computed = dict(zip((p.prompt_id for p in warm_up.prompts), warm_up.answers, strict=True))
        for i, prompt in enumerate(first.prompts):
            self.report.judged.append(self.judged(second, i, first.answers[i]))
            if prompt.prompt_id in computed:
                self.report.judged.append(self.judged(first, i, computed[prompt.prompt_id]))

    def check_served(self, phase_2: Phase) -> None:
        """Whether the replay came from outside the engine, and the reset told the truth."""
        served = served_in(phase_2, self.report.subject.capabilities.block_tokens)
        self.report.served = served
        reason = served.why_not_exercised()
        detail = (
            f"{served.external_tokens} of {served.servable_external_tokens} servable prompt tokens "
            f"from outside the engine; {served.local_tokens} from the engine itself"
        )
        if reason is not None:
            reason = f"{reason} {self.report.subject.kind.when_idle}"
        self.report.check("served share", reason is None, reason or detail, gate=True)
        if served.servable_local_tokens is not None:
            self.report.check(
                "reset emptied the engine",
                served.local_tokens <= served.servable_local_tokens,
                f"{served.local_tokens} tokens from the engine itself after the reset; repeats "
                f"within the replay explain {served.servable_local_tokens}",
            )

    def check_tiers(self, warm_up: Phase, phase_2: Phase) -> None:
        """First pass: stored, nothing loaded. After the reset: loaded."""
        fits, check = self._fits_engine(warm_up), self.report.check
        external = warm_up.delta.external_hit_tokens
        check(
            "first pass loads nothing",
            external == 0 if fits else None,
            f"{external} tokens from outside during the warm-up"
            + ("" if fits else "; the engine's memory is too small for all prompts"),
        )
        if self.report.subject.daemon is None:
            check("tier counters", None, "no daemon named (--daemon-metrics)")
            return
        stored = warm_up.delta.daemon.get("blocks_stored", 0)
        early = warm_up.delta.daemon.get("blocks_loaded", 0)
        loaded = phase_2.delta.daemon.get("blocks_loaded", 0)
        check("first pass stores", stored > 0, f"{stored} blocks stored in the warm-up", gate=True)
        if fits:
            check("first pass: no block loaded", early == 0, f"{early} blocks loaded")
        check("after reset: loads", loaded > 0, f"{loaded} blocks loaded", gate=True)
        for name in ("device_to_host", "host_to_device"):
            phase = warm_up if name == "device_to_host" else phase_2
            if name in phase.delta.daemon:
                moved = phase.delta.daemon[name]
                check(f"{name} moves", moved > 0, f"{moved} in {phase.name}", gate=True)
        failures = phase_2.delta.daemon.get("load_failures")
        if failures is not None:
            check("no load failed", failures == 0, f"{failures} failed loads in phase 2")

    def _fits_engine(self, warm_up: Phase) -> bool:
        """Whether all prompts fit the engine at once, so that it has no reason to load early."""
        capabilities = self.report.subject.capabilities
        block_tokens, num_blocks = capabilities.block_tokens, capabilities.num_blocks
        if block_tokens is None or num_blocks is None:
            return True
        max_tokens = self.report.sampling.max_tokens
        asked = [(a.prompt_tokens or 0) + max_tokens for a in warm_up.answers]
        return sum(-(-tokens // block_tokens) for tokens in asked) < num_blocks

    def check_last_token(self, *phases: Phase) -> None:
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
        self.report.check(
            "a token stays to compute",
            not whole,
            f"{len(whole)} of {len(known)} answers reused the whole prompt",
        )

    def check_counters(self, watch: Watch | None = None, what: str = "") -> None:
        """Counters never fall."""
        fallen = find_backward((watch or self.watch).readings)
        detail = ", ".join(fallen) or "all rose or stood"
        self.report.check(f"{what}counters never fall", not fallen, detail)
