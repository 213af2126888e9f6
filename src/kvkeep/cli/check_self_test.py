"""``kvkeep check self-test``: how many planted faults the check finds, and its false alarms."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.validate.report.json_file import write_json
from kvkeep.validate.self_test.lower_tiers import TierScore, score_tiers
from kvkeep.validate.self_test.outcome import SelfTest
from kvkeep.validate.self_test.score import FaultScore, StandScore, Told, score
from kvkeep.validate.self_test.simulated import SimulatedStand
from kvkeep.validate.statistics import CONFIDENCE

EXIT_FAILED = 1
EXIT_INPUT = 2
SIMULATED_PROMPTS, SIMULATED_ROUNDS, SIMULATED_PAIRS = 8, 5, 400
ALARMS_SHOWN_MAX = 5


@click.command("self-test")
@click.option("--simulated", is_flag=True, help="No engine: a small model on a real pool.")
@click.option("--stack", type=click.Path(path_type=Path), help="Stack file to start and plant in.")
@click.option(
    "--exact/--no-exact",
    default=True,
    show_default=True,
    help="Judge the stack to the bit; if not, an ordinary engine, and catches are only counted.",
)
@click.option("--model-id", help="Model of a stack of its own: smollm2, a folder, or an id.")
@click.option(
    "--num-prompts", type=click.IntRange(2, 200), default=20, show_default=True,
    help="Prompts on the stack; each is struck once by every fault, on both sides.",
)  # fmt: skip
@click.option(
    "--pairs", type=click.IntRange(1, 100_000), default=500, show_default=True,
    help="Prompts on the stack that are asked twice without a fault, held out from all others.",
)  # fmt: skip
@click.option("--seed", default=42, show_default=True, help="Seed of prompts and bits.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File to write it to.")
@click.option("--quiet", is_flag=True, help="Show neither progress nor tables.")
def self_test(
    simulated: bool,
    stack: Path | None,
    model_id: str | None,
    exact: bool,
    json_path: Path | None,
    quiet: bool,
    **counts: int,
) -> None:
    """Plant faults below and behind verification, and count what was refused and what was caught.

    Exit code 0 if every fault below was refused, every block-sized one behind was caught and there
    was no false alarm; 1 otherwise; 2 for bad input.
    """
    console = Console(quiet=quiet)
    try:
        _check_flags(simulated, stack, model_id)
        with _bars(console) as bars:
            stands = [_simulated(counts["seed"], _shown(bars, "simulated"))]
            tiers = score_tiers(rounds=SIMULATED_ROUNDS, seed=counts["seed"])
            if not simulated:
                stands.append(_live(stack, model_id, {**counts, "exact": exact}, bars))
        found = SelfTest(counts["seed"], stands, tiers)
        if json_path is not None:
            write_json(found.to_dict(), json_path)
    except InputError as error:
        click.echo(f"kvkeep check self-test: {error}", err=True)
        sys.exit(EXIT_INPUT)
    except UnavailableError as error:
        click.echo(f"kvkeep check self-test: failed: {error}", err=True)
        sys.exit(EXIT_FAILED)
    _show(found, console)
    sys.exit(0 if found.passed else EXIT_FAILED)


def _check_flags(simulated: bool, stack: Path | None, model_id: str | None) -> None:
    if simulated and (stack is not None or model_id is not None):
        raise InputError("--simulated runs without an engine: leave --stack and --model-id out.")
    if stack is not None and model_id is not None:
        raise InputError("--stack names the model itself: leave --model-id out.")


def _simulated(seed: int, told: Told) -> StandScore:
    with SimulatedStand.opened(SIMULATED_PROMPTS, seed) as stand:
        rounds, pairs = SIMULATED_ROUNDS, SIMULATED_PAIRS
        return asyncio.run(score(stand, rounds=rounds, pairs=pairs, seed=seed, told=told))


def _live(
    stack: Path | None, model_id: str | None, counts: Mapping[str, int], bars: Progress
) -> StandScore:
    from kvkeep.cli.checking import terminated_as_interrupt
    from kvkeep.validate.self_test.live import (
        LiveAddresses,
        LiveStand,
        own_spec,
        spec_of,
        started_for_faults,
    )

    async def run(where: LiveAddresses) -> StandScore:
        seed, num_prompts = counts["seed"], counts["num_prompts"]
        async with LiveStand.opened(where, num_prompts, seed, exact=exact) as stand:
            told = _shown(bars, "stack")
            return await score(stand, rounds=1, pairs=counts["pairs"], seed=seed, told=told)

    exact = bool(counts["exact"])
    spec = own_spec(model_id, exact=exact) if stack is None else spec_of(stack, exact=exact)
    with (
        terminated_as_interrupt(),
        started_for_faults(spec, quiet=bars.console.quiet) as where,
    ):
        return asyncio.run(run(where))


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def _shown(bars: Progress, stand: str) -> Told:
    tasks: dict[str, TaskID] = {}

    def told(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(f"{stand}: {what}", total=total)
        bars.update(tasks[what], completed=done)

    return told


def _show(found: SelfTest, console: Console) -> None:
    for stand in found.stands:
        console.print(_table(stand))
        if not stand.exact:
            console.print("Not judged to the bit: what was caught is a rate, and none is demanded.")
        console.print(sentence_of_alarms(stand), highlight=False, soft_wrap=True)
        for alarm in stand.alarms[:ALARMS_SHOWN_MAX]:
            console.print(f"  [red]{escape(alarm)}[/]")
    console.print(_tiers(found.tiers))
    console.print("[bold green]passed[/]" if found.passed else "[bold red]failed[/]")


def sentence_of_alarms(stand: StandScore) -> str:
    """How often it cried wolf, and how often it would at most."""
    floor = f", {stand.floor_prompts} others set the noise floor" if stand.floor_prompts else ""
    return (
        f"{stand.pairs} pairs without a fault{floor}: {stand.false_alarms} false alarms; with "
        f"{CONFIDENCE:.0%} confidence at most {stand.false_alarm_rate_max:.2%} of pairs"
    )


def _table(stand: StandScore) -> Table:
    table = Table(title=f"planted in {stand.stand} blocks", title_justify="left")
    for head in ("fault", "below: refused", "wrong answers", "behind: caught", "rate"):
        table.add_column(head, justify="left" if head == "fault" else "right")
    for store, suites in zip(stand.store, stand.suites, strict=True):
        table.add_row(
            store.fault.value,
            _counted(store),
            str(store.wrong_answers),
            _counted(suites),
            "-" if suites.rate is None else f"{suites.rate:.0%}",
        )
    return table


def _counted(each: FaultScore) -> str:
    if not each.planted:
        return "can't be made"
    unproven = f", {each.not_loaded} not loaded" if each.not_loaded else ""
    return f"{each.caught} of {each.planted}{unproven}"


def _tiers(tiers: Sequence[TierScore]) -> Table:
    table = Table(title="wrong reads of a lower tier", title_justify="left")
    for head in ("fault", "refused", "given out wrong"):
        table.add_column(head, justify="left" if head == "fault" else "right")
    for tier in tiers:
        table.add_row(tier.fault.value, f"{tier.caught} of {tier.planted}", str(tier.wrong_values))
    return table
