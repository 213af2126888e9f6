"""Generation from end to end: models, whole and streamed answers, several at once, clear errors."""

import asyncio
import time

from kvkeep.validate.answer import Answer
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import control_prompts
from kvkeep.validate.settings import Document
from kvkeep.validate.statistics import spread_s
from kvkeep.validate.suite.asking import FORMS, Form, ask
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.verdict import defect_of

NAME = "generation"
CONCURRENT = 3
MAX_TOKENS = 24
UNKNOWN_MODEL = "kvkeep-check-no-such-model"
GREEDY_SLACK_NATS = 1e-6


async def run(context: Context) -> list[SuiteReport]:
    """One report."""
    report = context.new_report(NAME, "end to end", MAX_TOKENS)
    report.judges_answers = False
    report.data = "the control prompts"
    endpoint = context.subject.front or context.subject.engine
    await _check_models(report, endpoint)
    await _check_forms(report, endpoint)
    await _check_streams(context, report, endpoint)
    await _check_errors(report, endpoint)
    return [report]


async def _check_models(report: SuiteReport, endpoint: Endpoint) -> None:
    """What the server says it serves is what it answers with."""
    listed = await endpoint.post_json("/v1/models", method="GET")
    report.check(
        "models are listed",
        listed.status_code == 200 and (endpoint.model or "") in listed.text,
        f"HTTP {listed.status_code}; asked for {endpoint.model}",
    )


async def _check_forms(report: SuiteReport, endpoint: Endpoint) -> None:
    defects = []
    for form in FORMS:
        salt = f"{report.run_id}-{form.name}"
        said = await ask(endpoint, control_prompts()[0].text, report.sampling, form, salt=salt)
        if said.defect is not None:
            defects.append(f"{form.name}: {said.defect}")
        elif form.is_streamed and said.num_events < 2:
            defects.append(f"{form.name}: the stream has {said.num_events} events with text")
    report.check("every form is whole", not defects, "; ".join(defects) or f"{len(FORMS)} forms")


async def _check_streams(context: Context, report: SuiteReport, endpoint: Endpoint) -> None:
    """Several generations at once stream, take the likeliest tokens, and have times."""
    prompts = control_prompts()[:CONCURRENT]
    began_s = time.perf_counter()
    answers = await asyncio.gather(
        *(
            endpoint.chat(prompt.text, report.sampling, salt=f"{report.run_id}-{i}")
            for i, prompt in enumerate(prompts)
        )
    )
    wall_s = time.perf_counter() - began_s
    context.progress("concurrent", len(answers), len(answers))
    defects = [defect for answer in answers if (defect := defect_of(answer)) is not None]
    report.check(
        f"{CONCURRENT} at once", not defects, "; ".join(defects) or f"{CONCURRENT} answers"
    )
    num_tokens = sum(len(answer.steps) for answer in answers)
    report.numbers |= {
        "ttft_s": spread_s([a.ttft_s for a in answers if a.ttft_s is not None]),
        "tokens_per_s": num_tokens / wall_s,
    }
    timed = [answer for answer in answers if answer.ttft_s is not None]
    early = [a for a in timed if (a.ttft_s or 0.0) <= (a.total_s or 0.0)]
    report.check(
        "times are measured", len(early) == len(answers), f"{len(early)} of {len(answers)} answers"
    )
    known = [answer for answer in answers if answer.steps]
    report.check(
        "temperature 0 is greedy",
        all(map(_is_greedy, known)) if known else None,
        f"{num_tokens} tokens, each the likeliest" if known else "the server reports no logprobs",
    )


def _is_greedy(answer: Answer) -> bool:
    """Whether no alternative was likelier than the token that was taken."""
    return all(
        step.logprob
        >= max((value for _, value in step.top), default=step.logprob) - GREEDY_SLACK_NATS
        for step in answer.steps
    )


async def _check_errors(report: SuiteReport, endpoint: Endpoint) -> None:
    """What can't be served is refused with a reason, and the server goes on."""
    unknown = await ask(endpoint, "Hi.", Sampling(1), Form(), more={"model": UNKNOWN_MODEL})
    report.check(
        "unknown model is refused",
        400 <= unknown.status < 500 and "model" in (unknown.error or ""),
        f"HTTP {unknown.status}: {unknown.error}",
    )
    malformed = await endpoint.post_json("/v1/chat/completions", {"messages": 7})
    report.check(
        "malformed request is refused",
        400 <= malformed.status_code < 500,
        f"HTTP {malformed.status_code}",
    )
    after = await ask(endpoint, "Hi.", Sampling(2), Form(), salt=report.run_id)
    report.check("serves on after errors", after.status == 200, f"HTTP {after.status}")


SUITE = Suite(
    name=NAME,
    title="Generates whole and streamed, several at once, and asks for what is not there.",
    proves="The interface generates right: streams, times, greedy tokens, clear errors.",
    document=Document.DISTRIBUTED,
    run=run,
    groups=("quick",),
    aliases=("test_generation_flow",),
    small_s=20.0,
)
