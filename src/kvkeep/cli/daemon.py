"""``kvkeep daemon``: keep KV blocks for the engines of this host."""

import logging
import os
import sys
from pathlib import Path

import click

from kvkeep.daemon.run import run
from kvkeep.daemon.settings import load_settings


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings.")
@click.option("--socket", help="Path of the control socket.")
@click.option("--pool", help="Path of the pool file; by default it follows from the socket.")
@click.option("--pool-bytes", help="Size of the pool, such as 2GiB.")
@click.option("--metrics-port", type=int, help="Port on 127.0.0.1 for /metrics and /status.")
@click.option("--events-socket", help="Path at which routers hear which blocks are kept.")
@click.option("--lease-s-max", type=float, help="The longest lease, in seconds.")
@click.option("--sessions-max", type=int, help="Connections at once.")
@click.option("--verify-on-start/--no-verify-on-start", default=None,
              help="Check every block that an earlier daemon left.")  # fmt: skip
@click.option(
    "--eviction", type=click.Choice(["lru", "s3fifo"]), help="Which block makes room first."
)
@click.option(
    "--planner",
    type=click.Choice(["auto", "load", "recompute"]),
    help="Whether blocks of lower tiers are loaded.",
)
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
    default="INFO",
    show_default=True,
    help="What is logged.",
)
def daemon(config: Path | None, log_level: str, **flags: object) -> None:
    """Keep KV blocks for the engines of this host until SIGTERM; says when it is ready."""
    level = logging.getLevelNamesMapping()[log_level.upper()]
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    given = {name: value for name, value in flags.items() if value is not None}
    run(load_settings(config, os.environ, given))
