"""Throughput beside an engine without a cache, by vLLM's own ``vllm bench serve``.

Random prompts of equal length, one answer token: nothing can be reused, so that what is measured is
what storing costs. The baseline runs first.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from kvkeep.validate.load import Endpoint
from kvkeep.validate.settings import Document
from kvkeep.validate.suite.base import Context, Suite, SuiteReport
from kvkeep.validate.suite.needs import BASELINE, package
from kvkeep.validate.suite.programs import python_of, run_program
from kvkeep.validate.suite.results import BASELINE as BASELINE_FILE
from kvkeep.validate.suite.results import CACHED, made, write_lines
from kvkeep.validate.suite.sizes import make_cutter

NAME = "bench"
THROUGHPUT_MIN = 0.99
"""Of the baseline's; the reference document asks for 0.95."""
THROUGHPUT_DOCUMENT = 0.95
ROUNDS_MAX = 3
"""A ratio below the limit is measured again: the median of all rounds counts."""
TIMEOUT_S = 3600.0
PROGRAM = """
import importlib.metadata, runpy, sys, vllm
known = importlib.metadata.version
importlib.metadata.version = lambda name: vllm.__version__ if name == "vllm" else known(name)
sys.argv[0] = "vllm"
runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__", alter_sys=False)
"""
"""vLLM's command line, which looks its version up under the name ``vllm`` (0.32,
entrypoints/cli/main.py): builds for CPUs are installed under another one."""
LENGTH_SLACK = 0.02
"""Random tokens made into text and back are seldom of exactly the length that was asked."""


async def run(context: Context) -> list[SuiteReport]:
    """One report."""
    settings, subject = context.settings, context.subject
    report = context.new_report(NAME, "vllm bench serve", settings.random_output_len)
    report.judges_answers = False
    report.data = "random tokens"
    cutter = await make_cutter(context)
    length = cutter.fit(report, "random_input_len", settings.random_input_len)
    folder = made(context, "vllm_bench")
    assert folder is not None, "suites of this document always have a results folder"
    assert subject.baseline is not None
    ratios: list[float] = []
    for _ in range(ROUNDS_MAX):
        results: dict[str, dict[str, Any]] = {}
        for name, endpoint in ((BASELINE_FILE, subject.baseline), (CACHED, subject.engine)):
            place = (folder, name, len(ratios))
            result = await _bench(context, report, endpoint, place, length)
            if result is None:
                return [report]
            results[name] = result
            _check_whole(report, name, result, length)
        _check_alike(report, results)
        theirs, ours = (_tokens_per_s(results[name]) for name in (BASELINE_FILE, CACHED))
        ratios.append(ours / theirs if theirs else 0.0)
        report.numbers |= {"baseline_tokens_per_s": theirs, "tokens_per_s": ours}
        if statistics.median(ratios) >= THROUGHPUT_MIN:
            break
    _judge(report, ratios)
    return [report]


async def _bench(
    context: Context,
    report: SuiteReport,
    endpoint: Endpoint,
    place: tuple[Path, str, int],
    length: int,
) -> dict[str, Any] | None:
    """Run it against one engine; None, and a failed check, if it did not work.

    ``place`` is the folder, the file's name and the number of the round, whose prompts are new:
    those of an earlier one would come out of the cache.
    """
    settings, (folder, name, round_idx) = context.settings, place
    seed = settings.random_seed if settings.random_seed is not None else settings.seed
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    arguments = {
        "backend": "vllm",
        "base-url": endpoint.url,
        "model": await _tokenizer_of(endpoint),
        "served-model-name": endpoint.model or "",
        "dataset-name": "random",
        "num-prompts": settings.num_prompts,
        "random-input-len": length,
        "random-output-len": settings.random_output_len,
        "seed": seed + round_idx,
        "result-dir": folder,
        "result-filename": path.name,
    }
    command = [python_of(settings, "vllm"), "-c", PROGRAM, "bench", "serve"]
    for option, value in arguments.items():
        command += [f"--{option}", str(value)]
    command += ["--save-result", "--ignore-eos", "--disable-tqdm"]
    context.progress(name, 0, 1)
    ran = await run_program(command, timeout_s=TIMEOUT_S, environment={"HF_HUB_OFFLINE": "1"})
    context.progress(name, 1, 1)
    write_lines(folder, f"{name}_output.txt", ran.lines, report)
    try:
        result = json.loads(path.read_text("utf-8")) if ran.code == 0 else None
    except (OSError, ValueError):
        result = None
    if not isinstance(result, dict):
        detail = f"exit code {ran.code}: {ran.last_words}"
        report.check(f"vllm bench serve, {name}", False, detail)
        return None
    report.files[f"vllm_bench/{path.name}"] = str(path)
    return result


async def _tokenizer_of(endpoint: Endpoint) -> str:
    """Where the engine's model lies, as it says itself; else the name it serves it by."""
    listed = await endpoint.get_json("/v1/models")
    rows = [row for row in listed.get("data", []) if row.get("id") == endpoint.model]
    return str((rows[0].get("root") if rows else None) or endpoint.model)


def _tokens_per_s(result: dict[str, Any]) -> float:
    return float(result.get("total_token_throughput") or 0.0)


def _check_whole(report: SuiteReport, name: str, result: dict[str, Any], length: int) -> None:
    completed, tokens = result.get("completed"), result.get("total_input_tokens") or 0
    wanted = report.settings.num_prompts * length
    report.check(
        f"all prompts complete, {name}",
        completed == report.settings.num_prompts,
        f"{completed} of {report.settings.num_prompts}",
    )
    report.check(
        f"input tokens as asked, {name}",
        abs(tokens - wanted) <= LENGTH_SLACK * wanted,
        f"{tokens} of {wanted}",
    )


def _check_alike(report: SuiteReport, results: dict[str, dict[str, Any]]) -> None:
    """Both engines got the same prompts, to the token: else their times say nothing."""
    tokens = {name: result.get("total_input_tokens") for name, result in results.items()}
    told = ", ".join(f"{name} {number}" for name, number in tokens.items())
    report.check("equal input tokens", len(set(tokens.values())) == 1, told)


def _judge(report: SuiteReport, ratios: list[float]) -> None:
    ratio = statistics.median(ratios)
    report.numbers |= {"throughput_ratio": ratio, "rounds": len(ratios)}
    report.check(
        "throughput",
        ratio >= THROUGHPUT_MIN,
        f"{ratio:.3f} of the baseline's in {len(ratios)} round(s); {THROUGHPUT_MIN} needed "
        f"({THROUGHPUT_DOCUMENT} in the reference document)",
    )


SUITE = Suite(
    name=NAME,
    title="Runs vllm bench serve against an engine without a cache, then against the subject.",
    proves="Storing costs next to no throughput where nothing can be reused.",
    document=Document.MULTI_PROCESS,
    run=run,
    groups=("performance",),
    aliases=("run-vllm-bench", "test_vllm_bench"),
    needs=(BASELINE, package("vllm", "vllm")),
    needs_baseline=True,
    small_s=180.0,
)
