"""What several commands about stacks share: which stack is meant, and how one is shown."""

from pathlib import Path
from typing import Any

import click

from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import load_spec
from kvkeep.stack.record import StackRecord, noted_folder
from kvkeep.stack.spec import default_state_dir


def find_folder(target: str, state_dir: Path | None) -> Path:
    """State folder of the stack that a user named by its name or by its file.

    Raises:
        InputError: It is neither, or the file is wrong.
    """
    if state_dir is not None:
        return state_dir.expanduser().resolve()
    if Path(target).is_file():
        return load_spec(target).state_path.expanduser().resolve()
    if "/" in target or target.endswith((".yaml", ".yml")):
        raise InputError(f"{target} is not there: name a stack, or its file.")
    return noted_folder(target) or default_state_dir(target).resolve()


def describe(record: StackRecord, folder: Path) -> dict[str, Any]:
    """A stack for a machine to read."""
    daemon = record.daemon
    return {
        "name": record.name,
        "state": record.state,
        "model": record.model,
        "pid": record.supervisor.pid,
        "engines": {engine.name: engine.url for engine in record.engines},
        "router": None
        if record.router is None
        else {"url": record.router.url, "admin_url": record.router.admin_url},
        "daemon": None
        if daemon is None
        else {"socket": daemon.socket, "metrics_url": daemon.metrics_url},
        "logs": str(folder / "logs"),
    }


def show(record: StackRecord, folder: Path) -> None:
    """Print a stack for a person."""
    click.echo(f"stack {record.name} is {record.state}")
    if record.router is not None:
        click.echo(f"  router            {record.router.url}  (admin {record.router.admin_url})")
    for engine in record.engines:
        model = f"model {engine.model or record.model}" + (", on demand" * engine.on_demand)
        click.echo(f"  engine {engine.name:<10} {engine.url}  ({model})")
    if record.daemon is not None:
        click.echo(f"  daemon            {record.daemon.metrics_url}  {record.daemon.socket}")
    click.echo(f"  logs              {folder / 'logs'}")
