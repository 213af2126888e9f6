"""``kvkeep announce``: an engine joins the fleets of all routers that follow an etcd."""

import asyncio
import contextlib
import json
import logging
import signal
import sys

import aiohttp
import click

from kvkeep.model.errors import InputError
from kvkeep.model.settings.sources import checked
from kvkeep.router.membership.etcd import EtcdSettings, check_etcd
from kvkeep.router.membership.member import Member
from kvkeep.router.membership.registration import Registration

TTL_S_MIN, TTL_S_MAX = 2, 3600
_ACCESS = ("ca_file", "cert_file", "key_file", "user", "password_file")


@click.command()
@click.argument("url")
@click.option("--etcd", "etcd_urls", multiple=True, required=True, help="Address of etcd; several.")
@click.option("--etcd-ca-file", default="", help="PEM file with the CA of an https etcd.")
@click.option("--etcd-cert-file", default="", help="PEM file with a certificate to show to it.")
@click.option("--etcd-key-file", default="", help="PEM file with its key, mode 0600.")
@click.option("--etcd-user", default="", help="User to be in etcd.")
@click.option("--etcd-password-file", default="", help="File with its password, mode 0600.")
@click.option("--prefix", default="/kvkeep/engines/", show_default=True, help="Of all entries.")
@click.option("--name", default="", help="What routers call the engine; by default HOST:PORT.")
@click.option("--role", default="serve", show_default=True, help="serve, prefill or decode.")
@click.option("--events", default="", help="Where it publishes block events: tcp://HOST:5557.")
@click.option("--replay", default="", help="Where it repeats those that were lost.")
@click.option("--ranks", default=1, help="Data-parallel ranks that publish, at ports in a row.")
@click.option("--ttl-s", default=15, show_default=True, help="How long it outlives its engine.")
def announce(
    url: str, etcd_urls: tuple[str, ...], prefix: str, ttl_s: int, ranks: int, **fields: str
) -> None:
    """Announce the engine at URL for as long as this command runs and the engine is well.

    For example: kvkeep announce http://127.0.0.1:8000 --etcd http://127.0.0.1:2379
    """
    if not TTL_S_MIN <= ttl_s <= TTL_S_MAX:
        raise InputError(f"--ttl-s {ttl_s} is no lease: choose {TTL_S_MIN} to {TTL_S_MAX}")
    access = {name: fields.pop(f"etcd_{name}") for name in _ACCESS}
    told = {"publish": fields.pop("events"), "replay": fields.pop("replay")}
    events = {"events": {**told, "ranks": ranks}} if any(told.values()) or ranks != 1 else {}
    member = checked(Member, {"url": url, **fields, **events})
    settings = checked(EtcdSettings, {"urls": list(etcd_urls), "prefix": prefix, **access})
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    asyncio.run(_announce(settings, member, ttl_s))


async def _announce(settings: EtcdSettings, member: Member, ttl_s: int) -> None:
    await check_etcd(settings, may_only_write=True)
    timeout = aiohttp.ClientTimeout(total=ttl_s / 3)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:

        async def is_well() -> bool:
            try:
                async with session.get(f"{member.url.rstrip('/')}/health") as answer:
                    return answer.status == 200
            except (aiohttp.ClientError, OSError):
                return False

        registration = Registration(settings, member, ttl_s, is_well)
        running = asyncio.create_task(registration.run())
        telling = asyncio.create_task(_tell(registration))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, running.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await running
        telling.cancel()


async def _tell(registration: Registration) -> None:
    await registration.announced.wait()
    click.echo(json.dumps({"event": "announced", "key": registration.key}))
