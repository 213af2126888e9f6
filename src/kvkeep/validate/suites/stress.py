"""Many requests at once, in every rhythm, and with little memory: all are answered, and right.

``levels``      so many in flight, across a reset, beside a flood that evicts: answers are judged
``sustained``   two requests a second for half a minute
``burst``       high and low load in turn: 15, 2, 20, 3 requests at once
``mixed``       short and long prompts, short and long answers, together
``overload``    more at once than any level: what is not answered is refused, and told when to ask

In all but the last every request has to be answered, and what the counters say has to add up to
what was asked.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import LOCAL_QUERIES
from kvkeep.validate.load import Sampling
from kvkeep.validate.prompts import control_prompts
from kvkeep.validate.runner import Phase, Watch
from kvkeep.validate.settings import Document
from kvkeep.validate.statistics import spread_s
from kvkeep.validate.suite.asking import Form, Said, ask
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.sizes import Cutter, make_cutter
from kvkeep.validate.suites.concurrent import make_prompts, run_level
from kvkeep.validate.verdict import defect_of

NAME = "stress"
LEVELS = (3, 10, 25, 50)
PROMPTS_PER_WORKER = 2
PROMPTS_LEAST = 20
MAX_TOKENS = 10
RATE_PER_S = 2.0
SUSTAINED_S = 30.0
BURSTS = (15, 2, 20, 3)
BURST_PAUSE_S = 2.0
MIXED_REQUESTS = 24
MIXED_TOKENS = (50, 300, 1200)
MIXED_ANSWERS = (4, 16, 48)
OVERLOAD_REQUESTS = 100
OVERLOAD_TOKENS = 4
STREAMED = Form(is_streamed=True)
REFUSALS = frozenset({429, 503})
"""Statuses of a server that has too much to do."""
ANSWERED_SHARE_MIN = 0.8
"""Below this share of answered requests the reference document fails a system; here every request
has to be answered, and the share is reported."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of an open loop: it is sent when its time has come, whatever is still running."""

    at_s: float
    """From the first one on."""
    prompt: Prompt
    sampling: Sampling


async def run(context: Context) -> list[SuiteReport]:
    """One report per number in flight, and one per rhythm."""
    reports = []
    is_named = "concurrent_requests" in context.named
    for workers in context.settings.concurrent_requests if is_named else LEVELS:
        report = context.new_report(NAME, f"{workers} in flight, flooded", MAX_TOKENS)
        num = max(PROMPTS_LEAST, PROMPTS_PER_WORKER * workers)
        prompts = await make_prompts(context, report, num)
        await run_level(context, report, prompts, workers, is_flooded=True)
        reports.append(report)
    cutter = await make_cutter(context)
    for name, arrivals in (
        ("sustained", _sustained(context, cutter)),
        ("burst", _bursts(context, cutter)),
        ("mixed", _mixed(context, cutter)),
    ):
        report = context.new_report(NAME, name, MAX_TOKENS)
        await _run_arrivals(context, report, arrivals)
        reports.append(report)
    reports.append(await _overload(context))
    return reports


def _prompts(cutter: Cutter, num: int, num_tokens: int, seed: int, name: str) -> list[Prompt]:
    made = [document.prompt() for document in cutter.documents(num, num_tokens, seed)]
    return [Prompt(f"{name}-{i + 1}", p.text, name, p.secrets) for i, p in enumerate(made)]


def _sustained(context: Context, cutter: Cutter) -> list[Arrival]:
    num = int(RATE_PER_S * SUSTAINED_S)
    prompts = _prompts(cutter, num, 200, context.settings.seed + 21, "sustained")
    sampling = Sampling(MAX_TOKENS, context.settings.seed)
    return [Arrival(i / RATE_PER_S, prompt, sampling) for i, prompt in enumerate(prompts)]


def _bursts(context: Context, cutter: Cutter) -> list[Arrival]:
    prompts = iter(_prompts(cutter, sum(BURSTS), 200, context.settings.seed + 22, "burst"))
    sampling = Sampling(MAX_TOKENS, context.settings.seed)
    return [
        Arrival(i * BURST_PAUSE_S, next(prompts), sampling)
        for i, num in enumerate(BURSTS)
        for _ in range(num)
    ]


def _mixed(context: Context, cutter: Cutter) -> list[Arrival]:
    seed, rng = context.settings.seed, Random(context.settings.seed)
    most = (context.subject.capabilities.max_model_len or 4096) // 2
    made = []
    for i in range(MIXED_REQUESTS):
        size = min(rng.choice(MIXED_TOKENS), most)
        (prompt,) = _prompts(cutter, 1, size, seed + 100 + i, "mixed")
        named = Prompt(f"mixed-{i + 1}", prompt.text, "mixed", prompt.secrets)
        made.append(Arrival(i / (2 * RATE_PER_S), named, Sampling(rng.choice(MIXED_ANSWERS), seed)))
    return made


async def _run_arrivals(context: Context, report: SuiteReport, arrivals: Sequence[Arrival]) -> None:
    """Send each request at its time; all have to be answered, and be counted."""
    subject = context.subject
    watch = Watch(subject.engine, subject.daemon)
    endpoint = subject.front or subject.engine
    endpoint.patience = max(1.0, len(arrivals) / 10)
    before = await watch.read_settled()
    began_s = time.perf_counter()
    answered = 0

    async def send(arrival: Arrival) -> Answer:
        nonlocal answered
        await asyncio.sleep(max(0.0, arrival.at_s - (time.perf_counter() - began_s)))
        text, sampling = arrival.prompt.text, arrival.sampling
        answer = await endpoint.chat(text, sampling, salt=report.run_id)
        answered += 1
        context.progress(report.mode, answered, len(arrivals))
        return answer

    answers = await asyncio.gather(*(send(arrival) for arrival in arrivals))
    wall_s = time.perf_counter() - began_s
    delta = (await watch.read_settled()).since(before)
    prompts = tuple(arrival.prompt for arrival in arrivals)
    phase = Phase(report.mode, prompts, tuple(answers), delta, wall_s)
    report.phases.append(phase)
    report.judges_answers = False
    _judge_answered(report, phase)
    _check_statistics(report, phase)


def _judge_answered(report: SuiteReport, phase: Phase) -> None:
    defects = [defect_of(answer) for answer in phase.answers]
    wrong = [f"request {i + 1}: {defect}" for i, defect in enumerate(defects) if defect]
    share = 1 - len(wrong) / max(1, len(defects))
    report.numbers |= {
        "answered_share": share,
        "requests_per_s": len(phase.answers) / phase.wall_s,
        "ttft_s": spread_s([a.ttft_s for a in phase.answers if a.ttft_s is not None]),
        "total_s": spread_s([a.total_s for a in phase.answers if a.total_s is not None]),
    }
    report.check(
        "every request is answered",
        not wrong,
        "; ".join(wrong[:3])
        or f"{len(defects)} requests ({ANSWERED_SHARE_MIN:.0%} suffice the reference document)",
    )


def _check_statistics(report: SuiteReport, phase: Phase) -> None:
    """Counters move, and add up to what was asked."""
    asked = [answer.prompt_tokens for answer in phase.answers]
    counted = phase.delta.engine.get(LOCAL_QUERIES)
    if counted is None or None in asked or report.subject.front is not None:
        report.check("statistics add up", None, "one engine's counters, with usage, are needed")
        return
    tokens = sum(number or 0 for number in asked)
    report.check(
        "statistics add up",
        counted >= tokens > 0,
        f"the engine looked {counted:.0f} tokens up; {tokens} were asked (those of preempted "
        "requests count twice)",
    )


async def _overload(context: Context) -> SuiteReport:
    """All at once: a server with limits turns some away, and says so as one that will be back."""
    report = context.new_report(NAME, "overload", OVERLOAD_TOKENS)
    report.judges_answers = False
    report.data = "the control prompts"
    endpoint = context.subject.front or context.subject.engine
    endpoint.patience = OVERLOAD_REQUESTS / 10
    texts = [prompt.text for prompt in control_prompts()]
    number = itertools.count(1)

    async def send(i: int) -> Said:
        text = f"Request {i + 1}. {texts[i % len(texts)]}"
        said = await ask(endpoint, text, report.sampling, STREAMED, salt=report.run_id)
        context.progress(report.mode, next(number), OVERLOAD_REQUESTS)
        return said

    judge_overload(report, await asyncio.gather(*map(send, range(OVERLOAD_REQUESTS))))
    after = await ask(endpoint, texts[0], report.sampling, STREAMED, salt=report.run_id)
    report.check("serves on after it", after.defect is None, after.defect or "answered")
    return report


def judge_overload(report: SuiteReport, said: Sequence[Said]) -> None:
    """Each request is answered, or refused with a status, a reason and a time to come back."""
    refused = [each for each in said if each.status in REFUSALS]
    curt = [
        f"HTTP {each.status}, Retry-After {each.retry_after}: {each.error}"
        for each in refused
        if not (each.retry_after or "").isdecimal() or not each.error
    ]
    broken = [each.defect for each in said if each.status not in REFUSALS and each.defect]
    num_answered = len(said) - len(refused) - len(broken)
    report.numbers |= {"answered": num_answered, "refused": len(refused)}
    report.check(
        "answered or refused",
        not broken and num_answered > 0,
        "; ".join(broken[:3]) or f"{num_answered} answered and {len(refused)} refused, at once",
    )
    report.check(
        "refusals say when to come back",
        not curt if refused else None,
        "; ".join(curt[:3]) or (f"all {len(refused)}" if refused else "nothing was refused"),
    )


SUITE = Suite(
    name=NAME,
    title="Asks many at once, steadily, in bursts and mixed, with eviction under way.",
    proves="Under load every request is answered, and reuse stays right while blocks are evicted.",
    document=Document.DISTRIBUTED,
    run=run,
    groups=("stress",),
    aliases=("test_stress",),
    settings=("concurrent_requests", "ifeval_file"),
    small_s=400.0,
)
