"""``kvkeep forward``: an engine's block events go to NATS JetStream, where routers read them."""

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Sequence

import click
import msgspec

from kvkeep.model.errors import InputError
from kvkeep.router.events.nats_forwarder import Forwarder
from kvkeep.router.events.nats_source import SUBJECTS, NatsAddress
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.events.zmq_source import ZmqAddress
from kvkeep.router.membership.member import NAME


@click.command()
@click.argument("name")
@click.option("--events", required=True, help="Where the engine publishes: tcp://HOST:5557.")
@click.option("--replay", default="", help="Where it repeats events that were lost.")
@click.option("--ranks", default=1, help="Data-parallel ranks of the engine, ports in a row.")
@click.option("--nats", "url", required=True, help="Server with JetStream: nats://HOST:4222.")
@click.option("--subject", default="", help="By default kvkeep.events.NAME.")
def forward(name: str, events: str, replay: str, ranks: int, url: str, subject: str) -> None:
    """Forward the block events of the engine that routers call NAME, until SIGTERM.

    For example: kvkeep forward a --events tcp://127.0.0.1:5557 --nats nats://10.0.0.9:4222
    """
    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} is no engine's name: see the name in GET /workers")
    try:
        told = msgspec.convert({"publish": events, "replay": replay, "ranks": ranks}, EngineEvents)
        msgspec.convert({"publish": url}, EngineEvents)
    except msgspec.ValidationError as error:
        raise InputError(str(error)) from error
    if not url.startswith("nats://"):
        raise InputError(f"--nats {url} is no server: write one like nats://10.0.0.9:4222")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    address = NatsAddress(url, subject or f"{SUBJECTS}.{name}")
    first = ZmqAddress(told.publish, told.replay or None)
    sources = [first.at_rank(rank) for rank in range(told.ranks)]
    asyncio.run(_forward(Forwarder(address), sources, address))


async def _forward(
    forwarder: Forwarder, sources: Sequence[ZmqAddress], address: NatsAddress
) -> None:
    running = asyncio.create_task(forwarder.run(sources))
    telling = asyncio.create_task(_tell(forwarder, address))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running
    telling.cancel()


async def _tell(forwarder: Forwarder, address: NatsAddress) -> None:
    await forwarder.forwarding.wait()
    click.echo(json.dumps({"event": "forwarding", "subject": address.subject}))
