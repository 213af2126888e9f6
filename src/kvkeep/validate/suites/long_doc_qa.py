"""Questions about long documents: how much sooner the first token comes with the documents' KV.

    baseline: computed round
    cache:    A/A noise -> warm-up -> round from the engine -> reset -> query round from outside

The baseline runs first, so that nothing warmed up for it helps the cache. Without an engine of its
own the baseline is the same engine, each request under a salt of its own, so that all is computed.
The engine's own cache is emptied before the query round: what it would serve proves nothing.
"""

import itertools
import statistics
from collections.abc import Sequence
from random import Random

from kvkeep.validate.answer import Prompt
from kvkeep.validate.runner import Phase, Watch
from kvkeep.validate.settings import Document
from kvkeep.validate.statistics import spread_s
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.needs import LONG_ENOUGH
from kvkeep.validate.suite.replay import Replay
from kvkeep.validate.suite.results import BASELINE, CACHED, made, write_lines, write_result
from kvkeep.validate.suite.sizes import make_cutter

NAME = "long-doc-qa"
IN_FLIGHT = 4
TTFT_GAIN_MIN = 0.60
"""The first token has to come sooner by this share of the baseline's time."""
ROUND_GAIN_MIN = 0.15
WARM_UP_RATIO_MAX = 1.2
"""What storing may cost the round that fills the cache."""
ORDERS = ("tile", "interleave", "random")
QUESTIONS = (
    "What is the code word of this passage? Then tell in a few sentences what happens.",
    "Who speaks in this passage, and about what? Begin with the code word.",
)


async def run(context: Context) -> list[SuiteReport]:
    """One report."""
    settings, subject = context.settings, context.subject
    report = context.new_report(NAME, "query round", settings.output_len)
    cutter = await make_cutter(context)
    length = cutter.fit(report, "document_length", settings.document_length)
    documents = cutter.documents(settings.num_documents, length, settings.seed)
    warm = [document.prompt(QUESTIONS[0]) for document in documents]
    queries = in_order(warm, ORDERS, settings.seed)
    replay = Replay(report, warm, in_flight=IN_FLIGHT, progress=context.progress)
    computed = await replay.phase(
        "baseline", warm, cold=True, watch=Watch(subject.baseline or subject.engine)
    )
    again = await replay.phase("cold", warm, cold=True)
    if subject.baseline is None:
        replay.note_noise(computed, again)
    warm_up = await replay.phase("warm-up", warm)
    if subject.baseline is not None:
        replay.note_noise(again, warm_up)
    phase_1 = await replay.phase("from the engine", queries)
    if not (await replay.reset()).ok:
        return [report]
    phase_2 = await replay.phase("query round", queries)
    replay.check_served(phase_2)
    replay.judge_usable(computed, again, warm_up)
    replay.judge_replay(warm_up, phase_1, phase_2)
    replay.check_last_token(phase_2)
    replay.check_counters()
    first = first_of_each(phase_2)
    _judge_speed(report, computed, warm_up, first)
    _write(context, report, (warm_up, first), computed)
    return [report]


def in_order(prompts: Sequence[Prompt], orders: Sequence[str], seed: int) -> list[Prompt]:
    """Lay out rounds: all in turn (tile), each twice in a row (interleave), shuffled (random)."""
    made: list[Prompt] = []
    for order in orders:
        if order == "tile":
            made += prompts
        elif order == "interleave":
            made += itertools.chain.from_iterable((prompt, prompt) for prompt in prompts)
        else:
            shuffled = list(prompts)
            Random(seed).shuffle(shuffled)
            made += shuffled
    return made


def first_of_each(phase: Phase) -> Phase:
    """The part of a phase in which each prompt is asked for the first time.

    Later ones may come from the engine itself, which would flatter the cache. Its wall time is in
    proportion to the time its answers took.
    """
    seen: set[str] = set()
    chosen = []
    for i, prompt in enumerate(phase.prompts):
        if prompt.prompt_id not in seen:
            seen.add(prompt.prompt_id)
            chosen.append(i)
    prompts = tuple(phase.prompts[i] for i in chosen)
    answers = tuple(phase.answers[i] for i in chosen)
    all_s = sum(answer.total_s or 0.0 for answer in phase.answers)
    share = sum(answer.total_s or 0.0 for answer in answers) / all_s if all_s else 1.0
    return Phase(phase.name, prompts, answers, phase.delta, phase.wall_s * share)


def mean_ttft_s(phase: Phase) -> float | None:
    """Mean time to the first token; None if no answer has one."""
    known = [answer.ttft_s for answer in phase.answers if answer.ttft_s is not None]
    return statistics.fmean(known) if known else None


def _judge_speed(report: SuiteReport, computed: Phase, warm_up: Phase, query: Phase) -> None:
    theirs, ours = mean_ttft_s(computed), mean_ttft_s(query)
    if theirs is None or ours is None:
        report.check("time to first token", None, "no answer has one", gate=True)
        return
    rounds = {
        name: phase.wall_s / max(1, len(phase.prompts))
        for name, phase in (("baseline", computed), ("warm-up", warm_up), ("query", query))
    }
    report.numbers |= {
        "query_ttft_per_prompt": ours,
        "baseline_ttft_per_prompt": theirs,
        "query_round_time_per_prompt": rounds["query"],
        "baseline_round_time_per_prompt": rounds["baseline"],
        "warmup_round_time_per_prompt": rounds["warm-up"],
        "query_ttft_s": spread_s([a.ttft_s for a in query.answers if a.ttft_s is not None]),
    }
    gain, round_gain = 1 - ours / theirs, 1 - rounds["query"] / rounds["baseline"]
    warm_ratio = rounds["warm-up"] / rounds["baseline"]
    report.check(
        "first token sooner",
        gain >= TTFT_GAIN_MIN,
        f"{ours:.3f} s against {theirs:.3f} s: {gain:.0%} sooner, {TTFT_GAIN_MIN:.0%} needed",
    )
    report.check(
        "round shorter",
        round_gain >= ROUND_GAIN_MIN,
        f"{rounds['query']:.3f} s a prompt against {rounds['baseline']:.3f} s: {round_gain:.0%} "
        f"shorter, {ROUND_GAIN_MIN:.0%} needed",
    )
    report.check(
        "warm-up costs little",
        warm_ratio <= WARM_UP_RATIO_MAX,
        f"{warm_ratio:.2f} times the baseline; {WARM_UP_RATIO_MAX} allowed",
    )
    _judge_limits(report, ours, rounds["query"])


def _judge_limits(report: SuiteReport, ttft_s: float, round_s: float) -> None:
    """Limits in seconds, where somebody named one."""
    settings = report.settings
    for name, took_s, limit_s in (
        ("first token in time", ttft_s, settings.max_ttft_s),
        ("round in time", round_s, settings.max_query_round_time_s),
    ):
        if limit_s is not None:
            report.check(name, took_s <= limit_s, f"{took_s:.3f} s; {limit_s} s allowed")


def _write(
    context: Context, report: SuiteReport, cached: tuple[Phase, Phase], computed: Phase
) -> None:
    folder = made(context, "long_doc_qa")
    if folder is None:
        return
    warm_up, query = cached
    for name, first, later in ((CACHED, warm_up, query), (BASELINE, computed, computed)):
        result = {
            "query_ttft_per_prompt": mean_ttft_s(later),
            "query_round_time_per_prompt": later.wall_s / max(1, len(later.prompts)),
            "warmup_round_time_per_prompt": first.wall_s / max(1, len(first.prompts)),
            "num_documents": report.settings.num_documents,
            "document_length": report.sizes["document_length"],
            "output_len": report.sampling.max_tokens,
            "scale": report.settings.scale,
        }
        write_result(folder, f"{name}_result", result, report)
        lines = [
            f"[{prompt.prompt_id}] {answer.error or answer.text}"
            for prompt, answer in zip(later.prompts, later.answers, strict=True)
        ]
        write_lines(folder, f"{name}_output.txt", lines, report)


SUITE = Suite(
    name=NAME,
    title="Asks about long documents, resets the engine, and asks about them again.",
    proves="Documents' KV comes back from outside, right, and sooner than computing it.",
    document=Document.MULTI_PROCESS,
    run=run,
    groups=("performance",),
    aliases=("run-long-doc-qa", "test_long_doc_qa"),
    needs=(LONG_ENOUGH,),
    needs_baseline=True,
    small_s=240.0,
)
