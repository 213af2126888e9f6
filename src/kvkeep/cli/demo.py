"""``kvkeep demo``: a real engine answers from stored KV, and survives its daemon."""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from kvkeep.model.errors import UnavailableError
from kvkeep.stack.precedence import load_spec
from kvkeep.stack.progress import Progress
from kvkeep.stack.supervisor import Stack
from kvkeep.validate.demo import Act, Row, play
from kvkeep.validate.load import Endpoint
from kvkeep.validate.prompts import documents

BLOCK_TOKENS = 32
DOCUMENT_WORDS = 2100
"""About 3,500 tokens of Shakespeare."""
ENGINE_TIMEOUT_S = 300.0
STACK = """\
name: demo
model: {model}
daemon: {{pool_bytes: 2GiB}}
engines:
  - {{name: a, cpus: "0", kv_cache_bytes: 1536MiB, max_model_len: 8192}}
  - {{name: b, cpus: "{second}", kv_cache_bytes: 1536MiB, max_model_len: 8192}}
"""


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, a folder, or an id.")
@click.option("--questions", type=click.IntRange(1, 100), default=12, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def demo(model: str, questions: int, *, as_json: bool) -> None:
    """Ask a dozen questions over long documents: cold, loaded, elsewhere, and without a daemon."""
    second = "1" if (os.cpu_count() or 1) > 1 else "0"
    console = Console(stderr=as_json)
    with tempfile.TemporaryDirectory(prefix="kvkeep-demo-") as folder:
        file = Path(folder) / "stack.yaml"
        file.write_text(STACK.format(model=json.dumps(model), second=second))
        spec = load_spec(file)
        with Progress() as progress, Stack(spec, progress=progress) as stack:
            rows = asyncio.run(_run(stack, questions, console))
    if as_json:
        click.echo(json.dumps([row.to_dict() for row in rows]))
    else:
        _show(rows, console)
    if any(row.promises_broken for row in rows):
        sys.exit(1)


async def _run(stack: Stack, num_questions: int, console: Console) -> list[Row]:
    model = stack.model_name
    names = {name: part.url for name, part in stack.engines.items()}
    prompts = [doc.prompt() for doc in documents(num_questions, DOCUMENT_WORDS)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    async with (
        Endpoint(names["a"], name="a", model=model, timeout_s=ENGINE_TIMEOUT_S) as a,
        Endpoint(names["b"], name="b", model=model, timeout_s=ENGINE_TIMEOUT_S) as b,
    ):
        with Bars(*columns, console=console) as bars:
            tasks: dict[str, object] = {}

            def show(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                bars.update(tasks[phase], completed=done)  # type: ignore[arg-type]

            return await play(_acts(stack, a, b, num_questions), None, prompts, BLOCK_TOKENS, show)


def _acts(stack: Stack, a: Endpoint, b: Endpoint, num_questions: int) -> list[Act]:
    few = min(2, num_questions)

    async def kill() -> None:
        await _reset(a)()
        await asyncio.to_thread(stack.daemon.kill)

    async def restart() -> None:
        await asyncio.to_thread(stack.daemon.restart)
        await _reset(a)()
        await _until_attached(stack)

    return [
        Act("cold: computed", a, "computed", num_questions),
        Act("again: still on the engine", a, "engine", num_questions, is_yardstick=True),
        Act("engine's cache reset: loaded", a, "kvkeep", num_questions, before=_reset(a)),
        Act("second engine, never saw them", b, "kvkeep", num_questions),
        Act("daemon killed: computed", a, "computed", few, before=kill),
        Act("daemon restarted: loaded", a, "kvkeep", num_questions, before=restart),
    ]


def _reset(engine: Endpoint) -> Callable[[], Awaitable[None]]:
    async def reset() -> None:
        report = await engine.reset_prefix_cache()
        if not report.ok:
            raise UnavailableError(f"engine {engine.name} did not reset its cache: {report.detail}")

    return reset


async def _until_attached(stack: Stack) -> None:
    """Both halves of both engines look for the daemon several times a second."""
    async with Endpoint(stack.daemon.metrics_url, name="daemon") as daemon:
        for _ in range(100):
            status = await daemon.get_json("/status")
            if status["workers"] >= len(stack.engines):
                return
            await asyncio.sleep(0.1)
    raise UnavailableError("the engines did not come back to the restarted daemon within 10 s")


def _show(rows: list[Row], console: Console) -> None:
    table = Table(title="kvkeep demo: the same questions over long documents", title_justify="left")
    table.add_column("phase")
    for head in ("first token (median)", "sooner than cold", "served", "answers"):
        table.add_column(head, justify="right")
    cold_s = rows[0].ttft_s
    for row in rows:
        sooner = f"{cold_s / row.ttft_s:.0f}x" if row.ttft_s and row is not rows[0] else ""
        answers = ", ".join(f"{num} {_said(name)}" for name, num in row.verdicts.items())
        served = "-" if row.name.endswith("computed") else f"{row.share:.1%}"
        color = "red" if row.promises_broken else "green"
        table.add_row(
            row.name, f"{row.ttft_s * 1e3:.0f} ms", sooner, served, f"[{color}]{answers}[/]"
        )
    console.print(table)
    for row in rows:
        for broken in row.promises_broken:
            console.print(f"[red]broken promise[/] in '{row.name}': {broken}", highlight=False)
    if any("drift" in row.verdicts for row in rows):
        console.print(
            "rounded: vLLM's own bfloat16 rounding between computing a prompt and reusing it, "
            "kvkeep or not; what kvkeep loads is held to the bit to what the engine itself had."
        )
    if not any(row.promises_broken for row in rows):
        console.print("[green]every promise held[/]")


def _said(verdict: str) -> str:
    return "rounded" if verdict == "drift" else verdict
