"""``kvkeep wait``: wait until a stack is ready."""

import json
from pathlib import Path

import click

from kvkeep.cli.target import describe, find_folder, show
from kvkeep.stack.progress import Progress
from kvkeep.stack.record import await_record
from kvkeep.stack.spec import START_TIMEOUT_S


@click.command()
@click.argument("stack")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Its state folder.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    default=START_TIMEOUT_S,
    envvar="KVBM_SERVER_START_TIMEOUT",
    show_default=True,
    help="Longest wait, in seconds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def wait(stack: str, state_dir: Path | None, timeout_s: float, as_json: bool, quiet: bool) -> None:
    """Wait until STACK, a name or a stack file, is ready.

    Exit code 0 once it is, 2 if it failed, ended, or was not ready in time.
    """
    folder = find_folder(stack, state_dir)
    with Progress(quiet=quiet) as progress, progress.task(f"stack {stack}") as task:
        record = await_record(folder, timeout_s, said=task.say)
    if as_json:
        click.echo(json.dumps(describe(record, folder)))
    else:
        show(record, folder)
