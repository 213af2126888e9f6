"""``kvkeep down``: stop a stack, and clear what a crashed one left."""

import json
from pathlib import Path

import click

from kvkeep.cli.target import find_folder
from kvkeep.stack.record import bring_down


@click.command()
@click.argument("stack")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Its state folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def down(stack: str, state_dir: Path | None, as_json: bool) -> None:
    """Stop STACK, a name or a stack file. Nothing happens if it is not up."""
    stopped = bring_down(find_folder(stack, state_dir))
    if as_json:
        click.echo(json.dumps({"state": "down", "stopped": stopped}))
    elif stopped:
        click.echo(f"stopped: {', '.join(stopped)}")
    else:
        click.echo("nothing was up")
