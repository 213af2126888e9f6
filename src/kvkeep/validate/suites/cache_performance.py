"""What the cache gains: computed against loaded, by length, over a conversation, and in memory.

Every ratio is taken within one run on one engine: computed prompts have salts of their own, the
same prompts come from outside after a reset. A ratio that is asserted without a proof that the
loads ran would say nothing, so the served share gates all of them.
"""

from collections.abc import Mapping, Sequence

from kvkeep.model.errors import UnavailableError
from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.runner import Phase, median_ttft_s, served_in
from kvkeep.validate.settings import Document
from kvkeep.validate.statistics import spread_s
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.needs import LONG_ENOUGH
from kvkeep.validate.suite.replay import Replay
from kvkeep.validate.suite.sizes import Cutter, make_cutter
from kvkeep.validate.verdict import Verdict

NAME = "cache-performance"
RATIO_MIN = 1.1
"""Computed over loaded time to first token, for the longest prompts."""
LENGTHS = {"small": (256, 1024, 3000), "full": (1000, 4000, 10_000)}
PER_LENGTH = 3
MAX_TOKENS = 16
ROUNDS = 4
ROUND_TOKENS = 400
QUESTIONS = (
    "What is the code word of this passage?",
    "Who is speaking?",
    "What happens next?",
    "What is the mood?",
)


async def run(context: Context) -> list[SuiteReport]:
    """One report by length, one of a conversation."""
    cutter = await make_cutter(context)
    return [await _run_lengths(context, cutter), await _run_rounds(context, cutter)]


async def _run_lengths(context: Context, cutter: Cutter) -> SuiteReport:
    report = context.new_report(NAME, "by length", MAX_TOKENS)
    settings = context.settings
    lengths: dict[int, list[Prompt]] = {}
    for wanted in LENGTHS[settings.scale]:
        fitted = cutter.fit(report, f"prompt_tokens_{wanted}", wanted)
        for i, document in enumerate(cutter.documents(PER_LENGTH, fitted, settings.seed + wanted)):
            # Two lengths that gave way to the same size are one.
            prompt = document.prompt()
            named = Prompt(f"{fitted}-tokens-{i + 1}", prompt.text, prompt.kind, prompt.secrets)
            lengths.setdefault(fitted, []).append(named)
    prompts = [prompt for of_length in lengths.values() for prompt in of_length[:PER_LENGTH]]
    replay = Replay(report, prompts, progress=context.progress)
    first = await replay.phase("computed", prompts, cold=True)
    second = await replay.phase("computed again", prompts, cold=True)
    replay.note_noise(first, second)
    warm_up = await replay.phase("warm-up", prompts)
    phase_1 = await replay.phase("from the engine", prompts)
    if not (await replay.reset()).ok:
        return report
    phase_2 = await replay.phase("from outside", prompts)
    replay.check_served(phase_2)
    replay.judge_usable(first, second, warm_up)
    replay.judge_replay(warm_up, phase_1, phase_2)
    replay.check_tiers(warm_up, phase_2)
    replay.check_last_token(phase_1, phase_2)
    _judge_lengths(report, list(lengths), first, phase_2)
    await _check_memory(report)
    replay.check_counters()
    return report


def _judge_lengths(
    report: SuiteReport, lengths: Sequence[int], computed: Phase, loaded: Phase
) -> None:
    ratios: dict[int, float] = {}
    for length in sorted(lengths):
        theirs = median_ttft_s(_of_length(computed, length))
        ours = median_ttft_s(_of_length(loaded, length))
        if theirs is None or not ours:
            continue
        ratios[length] = theirs / ours
        report.numbers[f"ratio_{length}_tokens"] = ratios[length]
    known = [answer.ttft_s for answer in loaded.answers if answer.ttft_s is not None]
    report.numbers["loaded_ttft_s"] = spread_s(known)
    if not ratios:
        report.check("first token sooner", None, "no answer has a time", gate=True)
        return
    longest, shortest = max(ratios), min(ratios)
    report.check(
        "first token sooner",
        ratios[longest] >= RATIO_MIN,
        f"computed takes {ratios[longest]:.2f} times as long as loaded at {longest} tokens; "
        f"{RATIO_MIN} needed",
    )
    if longest > shortest:
        report.check(
            "gain grows with length",
            ratios[longest] >= ratios[shortest],
            f"{ratios[shortest]:.2f} at {shortest} tokens, {ratios[longest]:.2f} at {longest}",
        )


def _of_length(phase: Phase, length: int) -> list[Answer]:
    pairs = zip(phase.prompts, phase.answers, strict=True)
    return [a for prompt, a in pairs if prompt.prompt_id.startswith(f"{length}-tokens-")]


async def _run_rounds(context: Context, cutter: Cutter) -> SuiteReport:
    """A conversation whose every round repeats all before; between rounds the engine forgets."""
    report = context.new_report(NAME, "rounds of a conversation", MAX_TOKENS)
    subject = context.subject
    size = cutter.fit(report, "round_tokens", ROUND_TOKENS * ROUNDS) // ROUNDS
    passages = cutter.documents(ROUNDS, size, context.settings.seed + 11)
    replay = Replay(report, [p.prompt() for p in passages], progress=context.progress)
    text, computed_s, reused_s = "", 0.0, 0.0
    external = could = drifted = 0
    for i, (passage, question) in enumerate(zip(passages, QUESTIONS, strict=True)):
        text += f"{passage.text}\n\n{question}\n\n"
        secrets = tuple(p.secret for p in passages[: i + 1])
        prompt = Prompt(f"round-{i + 1}", text, "round", secrets)
        computed = await replay.phase(f"round {i + 1}, computed", [prompt], cold=True)
        if i and not (await subject.engine.reset_prefix_cache()).ok:
            report.check("reset", False, f"refused before round {i + 1}")
            return report
        reused = await replay.phase(f"round {i + 1}", [prompt])
        replay.judge_usable(computed, reused)
        text += f"{reused.answers[0].text}\n\n"
        if i:
            computed_s += computed.answers[0].ttft_s or 0.0
            reused_s += reused.answers[0].ttft_s or 0.0
            external += reused.delta.external_hit_tokens
            served = served_in(reused, subject.capabilities.block_tokens)
            could += served.servable_external_tokens or 0
            item = replay.judged(reused, 0, computed.answers[0])
            # Computed in one go or behind what was loaded: the rounding is another, so that drift
            # is counted only. What no rounding explains fails.
            if item.judgement.verdict is Verdict.DRIFT:
                drifted += 1
            else:
                report.judged.append(item)
    ratio = computed_s / reused_s if reused_s else 0.0
    report.numbers |= {"computed_ttft_s": computed_s, "reused_ttft_s": reused_s, "ratio": ratio}
    report.numbers["rounds_drifted"] = drifted
    report.check(
        "rounds come from outside",
        external > 0,
        f"{external} tokens of rounds 2 to {ROUNDS}, of {could} in them",
        gate=True,
    )
    report.check(
        "rounds sooner",
        ratio >= RATIO_MIN,
        f"computed rounds take {ratio:.2f} times as long; {RATIO_MIN} needed",
    )
    return report


async def _check_memory(report: SuiteReport) -> None:
    """What the cache holds stays within what it was given."""
    daemon = report.subject.daemon
    if daemon is None:
        report.check("memory stays bounded", None, "no daemon named (--daemon-metrics)")
        return
    try:
        status: Mapping[str, object] = await daemon.get_json("/status")
    except UnavailableError as error:
        report.check("memory stays bounded", False, str(error))
        return
    gauges = status.get("gauges")
    gauges = gauges if isinstance(gauges, dict) else {}
    whole, free = (float(gauges.get(name, -1.0)) for name in ("slots", "slots_free"))
    is_known = whole >= 0
    report.check(
        "memory stays bounded",
        0 <= free <= whole if is_known else None,
        f"{free:.0f} of {whole:.0f} slots are free" if is_known else "the daemon does not say",
    )


SUITE = Suite(
    name=NAME,
    title="Times computed prompts against loaded ones, by length and over a conversation.",
    proves="Loading is faster than computing, the more so the longer the prompt.",
    document=Document.DISTRIBUTED,
    run=run,
    groups=("performance",),
    aliases=("test_cache_performance",),
    needs=(LONG_ENOUGH,),
    small_s=120.0,
)
