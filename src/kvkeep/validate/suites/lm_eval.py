"""A graded task through lm-evaluation-harness, twice: computed, and out of the cache.

    [baseline] -> first run -> reset -> second run -> item by item

Two averages that lie close together prove little, so the runs are compared item by item: items
that differ are asked again, one at a time and computed, and are right only if the two answers
part where two tokens tie, in the noise of as many requests at once. The grades are compared as
pairs (exact McNemar).
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvkeep.validate.answer import Answer, Prompt, TokenStep
from kvkeep.validate.counters import LOCAL_QUERIES, Counters
from kvkeep.validate.load import Endpoint
from kvkeep.validate.runner import PATIENT_REQUESTS, SERVED_SHARE_MIN, Judged, Watch
from kvkeep.validate.settings import Document
from kvkeep.validate.statistics import compare_pairs
from kvkeep.validate.suite.arithmetic import make_rows, read_tasks
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.needs import package
from kvkeep.validate.suite.programs import python_of, run_program
from kvkeep.validate.suite.replay import NOISE_NATS_MAX, Replay
from kvkeep.validate.suite.results import made, write_lines
from kvkeep.validate.verdict import Judgement, Verdict, near_tie_limit_nats, noise_floor

NAME = "lm-eval"
TASK, TASK_GIVEN = "gsm8k_generated", "gsm8k_given"
"""Their names make the sample files those of the reference document: ``samples_gsm8k_*.jsonl``."""
MAX_TOKENS, MAX_TOKENS_GIVEN = 64, 256
"""Solutions of GSM8K have more steps than those of tasks made here."""
TIMEOUT_S = 3600.0
NOISE_ITEMS_MAX = 16
"""Completed twice where items differ: two runs with many at once differ by more than two alone."""
TOP_LOGPROBS = 5
TASK_FILE = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until:
    - "\\n\\n"
    - "Question:"
  do_sample: false
  temperature: 0.0
  max_gen_toks: {max_tokens}
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "#### (-?[0-9.,]+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore:
      - ","
"""


@dataclass(frozen=True, slots=True)
class Graded:
    """One run of the task."""

    texts: Mapping[int, str]
    """Answer by item."""
    grades: Mapping[int, bool]
    delta: Counters


async def run(context: Context) -> list[SuiteReport]:
    """One report."""
    settings, subject = context.settings, context.subject
    given = settings.gsm8k_file
    report = context.new_report(NAME, "twice", MAX_TOKENS if given is None else MAX_TOKENS_GIVEN)
    report.data = given or f"arithmetic made with seed {settings.seed}"
    folder = made(context, "lm_eval")
    assert folder is not None, "suites of this document always have a results folder"
    rows = make_rows(settings.limit, settings.seed, read_tasks(given) if given else ())
    report.sizes["limit"] = {"asked": settings.limit, "run": len(rows)}
    _write_task(folder, report, rows)
    graded: dict[str, Graded] = {}
    if subject.baseline is not None:
        found = await _evaluate(context, report, Watch(subject.baseline), folder / "baseline_run")
        if found is None:
            return [report]
        graded["baseline"] = found
    watch = Watch(subject.engine, subject.daemon)
    replay = Replay(report, [], watch=watch)
    for name in ("first_run", "second_run"):
        if name == "second_run" and not (await replay.reset()).ok:
            return [report]
        found = await _evaluate(context, report, watch, folder / name)
        if found is None:
            return [report]
        graded[name] = found
    _check_served(report, graded["second_run"])
    await _compare(context, report, graded, rows)
    replay.check_counters()
    return [report]


def _task_of(report: SuiteReport) -> str:
    return TASK if report.settings.gsm8k_file is None else TASK_GIVEN


def _write_task(folder: Path, report: SuiteReport, rows: Sequence[Mapping[str, str]]) -> None:
    task = _task_of(report)
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    text = TASK_FILE.format(task=task, data=data, max_tokens=report.sampling.max_tokens)
    (folder / f"{task}.yaml").write_text(text, "utf-8")


async def _evaluate(
    context: Context, report: SuiteReport, watch: Watch, folder: Path
) -> Graded | None:
    """Run the task once; None, and a failed check, if it did not work."""
    settings, endpoint = context.settings, watch.engine
    _empty(folder)
    arguments = {
        "model": endpoint.model,
        "base_url": f"{endpoint.url}/v1/completions",
        "num_concurrent": settings.num_concurrent,
        "max_retries": 1,
        "tokenized_requests": False,
        "tokenizer_backend": None,
        "timeout": int(settings.http_timeout_s * max(1.0, settings.num_concurrent / 3) * 4),
    }
    shown = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [python_of(settings, "lm_eval"), "-m", "lm_eval", "--model", "local-completions"]
    command += [
        "--model_args",
        shown,
        "--tasks",
        _task_of(report),
        "--include_path",
        str(folder.parent),
    ]
    command += ["--output_path", str(folder), "--log_samples", "--seed", str(settings.seed)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    before = await watch.read_settled()
    context.progress(folder.name, 0, 1)
    ran = await run_program(command, timeout_s=TIMEOUT_S, environment=environment)
    context.progress(folder.name, 1, 1)
    delta = (await watch.read_settled()).since(before)
    write_lines(folder, "output.txt", ran.lines, report)
    samples = _gather_samples(folder)
    if ran.code != 0 or samples is None:
        report.check(f"lm_eval, {folder.name}", False, f"exit code {ran.code}: {ran.last_words}")
        return None
    report.files[f"{folder.name}/{samples.name}"] = str(samples)
    return _read_samples(samples, delta)


def _empty(folder: Path) -> None:
    """Make a run's folder, without what an earlier run left there."""
    folder.mkdir(exist_ok=True)
    for old in folder.rglob("samples_*.jsonl"):
        old.unlink()


def _gather_samples(folder: Path) -> Path | None:
    """Put the sample file where the reference document has it: it lies below the model's name."""
    found = sorted(folder.rglob("samples_*.jsonl"))
    if not found:
        return None
    place = folder / found[-1].name
    if found[-1] != place:
        found[-1].replace(place)
    return place


def _read_samples(path: Path, delta: Counters) -> Graded:
    texts, grades = {}, {}
    for line in path.read_text("utf-8").splitlines():
        sample = json.loads(line)
        item = int(sample["doc_id"])
        texts[item] = str(sample["resps"][0][0])
        grades[item] = bool(sample.get("exact_match"))
    return Graded(texts, grades, delta)


def _check_served(report: SuiteReport, second: Graded) -> None:
    """Retrieved tokens of the second run, of those that could have been."""
    asked = round(second.delta.engine.get(LOCAL_QUERIES, 0.0))
    block_tokens = report.subject.capabilities.block_tokens or 0
    # Of each prompt the last tokens are always computed, a block at most.
    could = asked - second.delta.local_hit_tokens - block_tokens * len(second.texts)
    external = second.delta.external_hit_tokens
    report.numbers |= {"retrieved_tokens": external, "asked_tokens": asked}
    report.check(
        "served share",
        external >= SERVED_SHARE_MIN * could > 0,
        f"{external} of {could} tokens came from outside the engine; {SERVED_SHARE_MIN:.0%} needed",
        gate=True,
    )


async def _compare(
    context: Context,
    report: SuiteReport,
    graded: Mapping[str, Graded],
    rows: Sequence[Mapping[str, str]],
) -> None:
    first, second = graded["first_run"], graded["second_run"]
    items = range(len(rows))
    for name, one in graded.items():
        missing = [item for item in items if not one.texts.get(item, "").strip()]
        report.check(f"all items answered, {name}", not missing, f"{len(missing)} are missing")
        report.numbers[f"{name}_right"] = sum(one.grades.values())
    if any(dict(one.texts) != dict(second.texts) for one in graded.values()):
        await _measure_noise(context, report, [row["prompt"] for row in rows])
    for name, reference in graded.items():
        if name == "second_run":
            continue
        unequal = 0
        for item in items:
            texts = (reference.texts.get(item, ""), second.texts.get(item, ""))
            unequal += texts[0] != texts[1]
            prompt = Prompt(f"{_task_of(report)}-{item}", rows[item]["prompt"], "task")
            judged = await _judge_item(context.subject.engine, report, prompt, texts)
            report.judged.append(Judged(f"{name} and second_run", prompt, item, *judged))
        report.numbers[f"unequal_to_{name}"] = unequal
        if report.settings.strict:
            report.check(f"equal to {name}, byte by byte", not unequal, f"{unequal} items differ")
        pairs = compare_pairs(
            [reference.grades.get(item, False) for item in items],
            [second.grades.get(item, False) for item in items],
        )
        report.numbers[f"pairs_{name}"] = pairs.to_dict()
        report.check(
            f"no worse than {name}",
            not pairs.is_worse,
            f"{pairs.only_reference} lost, {pairs.only_candidate} won, p = {pairs.p_value:.3f}",
        )
    report.numbers["strict_equal"] = first.texts == second.texts


async def _measure_noise(context: Context, report: SuiteReport, texts: Sequence[str]) -> None:
    """How far two computed runs of some prompts differ, as many at once as lm_eval had."""
    engine, num_at_once = context.subject.engine, context.settings.num_concurrent
    turns = asyncio.Semaphore(num_at_once)
    engine.patience = max(1.0, num_at_once / PATIENT_REQUESTS)

    async def one(i: int, run: str) -> Answer:
        async with turns:
            salt = f"{report.run_id}-noise-{run}-{i}"
            return await complete(engine, texts[i], salt, report.sampling.max_tokens)

    some = range(min(NOISE_ITEMS_MAX, len(texts)))
    first, second = [await asyncio.gather(*(one(i, run) for i in some)) for run in ("A", "B")]
    report.noise_nats = noise_floor(zip(first, second, strict=True))
    report.check(
        "noise floor",
        report.noise_nats <= NOISE_NATS_MAX,
        f"two computed runs lie {report.noise_nats:.4f} nat apart; {NOISE_NATS_MAX} allowed",
    )


async def _judge_item(
    engine: Endpoint, report: SuiteReport, prompt: Prompt, texts: tuple[str, str]
) -> tuple[Judgement, Answer, Answer]:
    """Equal, or asked again: a difference is excused only where two tokens tie."""
    answers = [Answer(text=text, finish_reason="stop") for text in texts]
    if texts[0] == texts[1]:
        return Judgement(Verdict.IDENTICAL, "The texts are equal."), answers[0], answers[1]
    cold = [
        await complete(
            engine,
            prompt.text,
            f"{report.run_id}-{prompt.prompt_id}-{i}",
            report.sampling.max_tokens,
        )
        for i in range(2)
    ]
    if cold[0].error is not None or not cold[0].steps:
        reason = f"The texts differ, and asked again: {cold[0].error or 'no logprobs'}."
        return Judgement(Verdict.DRIFT, reason), answers[0], answers[1]
    limit_nats = near_tie_limit_nats(max(report.noise_nats, noise_floor([(cold[0], cold[1])])))
    gaps = [gap_at_fork(cold[0], text) for text in texts]
    gap_nats = max((gap for gap in gaps if gap is not None), default=0.0)
    fine = gap_nats <= limit_nats
    return (
        Judgement(
            Verdict.NEAR_TIE if fine else Verdict.DRIFT,
            f"The texts part where the two best tokens lie {gap_nats:.3f} nat apart "
            f"(limit {limit_nats:.3f}).",
            gap_nats=gap_nats,
        ),
        answers[0],
        answers[1],
    )


async def complete(engine: Endpoint, text: str, salt: str, max_tokens: int) -> Answer:
    """Complete a prompt, computed, with its tokens as text and their alternatives."""
    body = {
        "model": engine.model,
        "prompt": text,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": TOP_LOGPROBS,
        "cache_salt": salt,
    }
    response = await engine.post_json("/v1/completions", body)
    if response.status_code != 200:
        return Answer(error=f"HTTP {response.status_code}: {response.text[:200]}")
    choice: dict[str, Any] = response.json()["choices"][0]
    said = choice.get("logprobs") or {}
    steps = []
    for token, logprob, top in zip(
        said.get("tokens") or (),
        said.get("token_logprobs") or (),
        said.get("top_logprobs") or (),
        strict=True,
    ):
        ranked = sorted((top or {}).items(), key=lambda pair: -pair[1])
        steps.append(TokenStep(str(token), float(logprob), tuple(ranked)))
    return Answer(choice["text"], tuple(steps), choice.get("finish_reason"))


def gap_at_fork(computed: Answer, text: str) -> float | None:
    """How far the two best tokens lie apart where a text leaves a computed answer.

    Returns:
        Nats; None if it does not leave it. A text that is only shorter was stopped.
    """
    at = 0
    for step in computed.steps:
        piece = text[at : at + len(step.token)]
        if piece != step.token:
            if step.token.startswith(piece) and at + len(piece) == len(text):
                return None
            return step.top[0][1] - step.top[1][1] if len(step.top) > 1 else float("inf")
        at += len(step.token)
    return None


SUITE = Suite(
    name=NAME,
    title="Grades arithmetic through lm-evaluation-harness, resets the engine, and grades again.",
    proves="Reuse changes no answer and no grade, item by item.",
    document=Document.MULTI_PROCESS,
    run=run,
    groups=("performance",),
    aliases=("run-lm-eval", "test_lm_eval"),
    needs=(package("lm_eval", "lm-eval"),),
    settings=("strict", "gsm8k_file"),
    needs_baseline=True,
    small_s=180.0,
)
