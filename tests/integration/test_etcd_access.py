"""An etcd that wants certificates, users and passwords: who has them is served, others are told."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvkeep.model.errors import InputError
from kvkeep.router.membership.etcd import EtcdSettings, check_etcd
from kvkeep.router.membership.etcd_client import EtcdClient
from kvkeep.router.membership.member import Member
from kvkeep.router.membership.registration import Registration
from tests.integration.test_etcd_membership import Fleet, running
from tests.servers.etcd import EtcdServer
from tests.servers.tls import Certificates

PREFIX = "/test/engines/"
PASSWORDS = {"router": "open, sesame", "engine": "sésame"}
PATIENCE_S = 120.0


class Guarded:
    """A server, and what its clients need."""

    def __init__(self, folder: Path) -> None:
        self.files = Certificates(folder)
        self.server = EtcdServer(self.files).run()
        kinds = {"router": "READ", "engine": "READWRITE"}
        users = {name: (password, kinds[name]) for name, password in PASSWORDS.items()}
        self.server.ask_for_users(users, PREFIX)
        self._folder = folder

    def values(self, name: str, *, password: str = "", **other: Any) -> dict[str, Any]:
        """Settings with which a user is let in, or what is otherwise."""
        password_file = self._folder / f"{name}.password"
        password_file.write_text((password or PASSWORDS[name]) + "\n")
        password_file.chmod(0o600)
        good = {
            "urls": [self.server.url],
            "prefix": PREFIX,
            "timeout_s": 60.0,
            "ca_file": self.files.ca_file,
            "cert_file": self.files.client_file,
            "key_file": self.files.client_key_file,
            "user": name,
            "password_file": str(password_file),
        }
        return {**good, **other}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """One server for all that leave it as it is."""
    guarded = Guarded(tmp_path_factory.mktemp("etcd"))
    yield guarded
    guarded.server.stop()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Guarded]:
    """A server of its own for a test that kills it."""
    guarded = Guarded(tmp_path)
    yield guarded
    guarded.server.stop()


async def test_who_shows_what_is_wanted_is_let_in(mortal: Guarded) -> None:
    """An engine's entry reaches a router, before a restart of etcd and after it."""
    fleet = Fleet(EtcdSettings(**mortal.values("router", resync_s=0.5)))
    told = EtcdSettings(**mortal.values("engine"))
    await check_etcd(fleet.source._settings)
    await check_etcd(told)
    first = Registration(told, Member(url="http://a:1", name="a"), ttl_s=60)
    async with running(fleet.source.run()):
        async with running(first.run()):
            await fleet.until_names("a")
            await asyncio.to_thread(mortal.server.kill)
            await asyncio.wait_for(fleet.source.away.wait(), PATIENCE_S)
            await asyncio.to_thread(mortal.server.run)
            second = Registration(told, Member(url="http://b:1", name="b"), ttl_s=60)
            async with running(second.run()):
                await fleet.until_names("a", "b")
            await fleet.until_names("a")
        await fleet.until_names()


async def test_a_token_that_has_ended_is_had_anew(guarded: Guarded) -> None:
    """The password is shown once more, and the call is answered."""
    settings = EtcdSettings(**guarded.values("router"))
    access, url = settings.load_access(), guarded.server.url
    async with aiohttp.ClientSession() as session:
        client = EtcdClient(session, url, settings.timeout_s, access)
        await client.look_below(PREFIX)
        access.tokens[url] = ended = "ended.1"
        found = await client.find_below(PREFIX)

    assert found.entries == ()
    assert access.tokens[url] != ended


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"password": "close, sesame"}, "refuses the user 'router': authentication failed"),
        ({"user": "nobody"}, "refuses the user 'nobody': authentication failed"),
        ({"user": "", "password_file": ""}, "refuses a client without a user: user name is empty"),
        ({"prefix": "/secret/"}, "refuses the user 'router': permission denied"),
        ({"ca_file": ""}, "can't be reached by TLS: unable to get local issuer certificate"),
        ({"cert_file": "", "key_file": ""}, "can't be reached by TLS: "),
    ],
    ids=["password", "user", "nameless", "role", "authority", "certificate"],
)
async def test_who_is_not_let_in_is_told_why(
    guarded: Guarded, other: dict[str, Any], said: str
) -> None:
    """One sentence with etcd's words, and never the password."""
    with pytest.raises(InputError) as caught:
        await check_etcd(EtcdSettings(**guarded.values("router", **other)))

    assert said in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_one_who_may_write_alone_can_announce(guarded: Guarded) -> None:
    """What it can't read is for routers; a wrong password is one all the same."""
    values = guarded.values("engine", prefix="/secret/")
    await check_etcd(EtcdSettings(**values), may_only_write=True)
    with pytest.raises(InputError, match="permission denied"):
        await Registration(EtcdSettings(**values), Member(url="http://a:1"), ttl_s=60).run()
    wrong = EtcdSettings(**guarded.values("engine", password="wrong"))
    with pytest.raises(InputError, match="authentication failed"):
        await check_etcd(wrong, may_only_write=True)


def test_an_etcd_that_is_away_is_no_reason_to_stop() -> None:
    """The last known fleet stays, and so does one that begins with nobody."""
    asyncio.run(check_etcd(EtcdSettings(urls=["https://127.0.0.1:1"], timeout_s=1.0)))


def test_commands_end_with_one_sentence(guarded: Guarded, tmp_path: Path) -> None:
    """And code 2, before they serve anybody."""
    config = tmp_path / "router.yaml"
    values = guarded.values("router", password="wrong")
    config.write_text(json.dumps({"port": 0, "etcd": values}))
    given = {name.replace("_", "-"): str(values[name]) for name in ("ca_file", "user")}
    access = [word for name, value in given.items() for word in (f"--etcd-{name}", value)]
    files = {"cert": values["cert_file"], "key": values["key_file"]}
    access += [word for name, file in files.items() for word in (f"--etcd-{name}-file", file)]
    access += ["--etcd-password-file", values["password_file"]]
    for command in (
        ["route", "--config", str(config)],
        ["announce", "http://127.0.0.1:1", "--etcd", guarded.server.url, *access],
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "kvkeep", *command],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

        assert ended.returncode == 2
        assert "refuses the user 'router': authentication failed" in ended.stderr
        assert ended.stdout == ""
        assert len(ended.stderr.strip().splitlines()) == 1
