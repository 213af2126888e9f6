"""``kvkeep route``: one OpenAI-compatible address for a fleet of engines."""

import logging
import os
import sys
from pathlib import Path
from typing import get_args

import click

from kvkeep.router.handoff.settings import TransportName
from kvkeep.router.run import run
from kvkeep.router.settings import PolicyName, load_settings
from kvkeep.stack.routing.running import check_running


@click.command()
@click.argument("urls", nargs=-1, metavar="[URL]...")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings.")
@click.option("--prefill", multiple=True, metavar="URL", help="An engine for prefill only.")
@click.option("--decode", multiple=True, metavar="URL", help="An engine for decoding only.")
@click.option(
    "--transport",
    type=click.Choice(get_args(TransportName)),
    help="How blocks get from prefill to decode: through kvkeep's pool, or vLLM's NixlConnector.",
)
@click.option("--policy", type=click.Choice(get_args(PolicyName)), help="How an engine is chosen.")
@click.option("--host", help="Address to listen on; by default this host only.")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.")
@click.option("--admin-host", help="Address of metrics and workers; others than loopback: a key.")
@click.option("--admin-port", type=int, help="Port of metrics and workers; 0 takes a free one.")
@click.option("--admin-key-file", help="File that holds the key for that port.")
@click.option("--engines-file", help="YAML file that names engines and may change.")
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
    default="INFO",
    show_default=True,
    help="What is logged.",
)
def route(
    urls: tuple[str, ...],
    prefill: tuple[str, ...],
    decode: tuple[str, ...],
    config: Path | None,
    log_level: str,
    **flags: object,
) -> None:
    """Relay requests to the engines at these URLs until SIGTERM; says when it is ready.

    For example: kvkeep route http://127.0.0.1:8000 http://127.0.0.1:8001 --port 8080, or
    kvkeep route --prefill http://127.0.0.1:8000 --decode http://127.0.0.1:8001 --transport nixl
    """
    level = logging.getLevelNamesMapping()[log_level.upper()]
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    given = {name: value for name, value in flags.items() if value is not None}
    if urls or prefill or decode:
        roles = [{"url": url, "role": "prefill"} for url in prefill]
        roles += [{"url": url, "role": "decode"} for url in decode]
        given["engines"] = [*urls, *roles]
    settings = load_settings(config, os.environ, given)
    check_running(settings)
    run(settings)
