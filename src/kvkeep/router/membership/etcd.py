"""Engines that announce themselves in etcd under a lease: an engine that dies leaves by itself.

An entry lies at ``PREFIX/NAME`` and holds a JSON object as the file of engines has them. All are
read, then watched from that revision on, and read again every so often: that closes a watch whose
connection died unnoticed. While etcd is away the last known fleet stays.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import aiohttp
import msgspec

from kvkeep.model.clock import Clock
from kvkeep.model.errors import InputError, RefusedError, UnavailableError
from kvkeep.router.membership.etcd_access import EtcdAccess, load_access
from kvkeep.router.membership.etcd_client import LINE_BYTES_MAX, Entry, EtcdClient
from kvkeep.router.membership.member import Member

log = logging.getLogger(__name__)

ADDRESSES_MAX = 16
VALUE_BYTES_MAX = 4096
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Before each further try while etcd is away; the last one repeats."""


class EtcdSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where engines announce themselves in etcd."""

    urls: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=r"^https?://[!-~]+$")]],
        msgspec.Meta(min_length=1, max_length=ADDRESSES_MAX),
    ]
    """Addresses of etcd's client ports, such as ``http://127.0.0.1:2379``; tried in turn."""
    ca_file: str = ""
    """PEM file with the certificates to trust where addresses begin with https; empty: the
    system's."""
    cert_file: str = ""
    """PEM file with a certificate to show, where etcd wants one."""
    key_file: str = ""
    """PEM file (mode 0600) with its key."""
    user: str = ""
    """Where etcd has users: the one to be. It reads everything under ``prefix``."""
    password_file: str = ""
    """File (mode 0600) with that user's password on one line."""
    prefix: Annotated[str, msgspec.Meta(pattern=r"^/[!-~]{0,200}/$")] = "/kvkeep/engines/"
    """In front of each engine's name; begins and ends with a slash."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 2.0
    """For one call, in seconds."""
    resync_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 10.0
    """After so many seconds of watching all entries are read anew."""
    keep_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 30.0
    """Entries that are missing after etcd was away stay for so long: leases may have ended just
    because nobody could renew them, and their engines announce themselves anew."""

    def __post_init__(self) -> None:
        files = (self.ca_file, self.cert_file, self.key_file, self.password_file)
        if any("\0" in name for name in files):
            raise ValueError("files must be names without a zero byte")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file belong together: write both or none")
        if bool(self.user) != bool(self.password_file):
            raise ValueError("user and password_file belong together: write both or none")

    def load_access(self) -> EtcdAccess:
        """Read the files that are named.

        Raises:
            InputError: One can't be used.
        """
        return load_access(
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
            user=self.user,
            password_file=self.password_file,
        )


async def check_etcd(settings: EtcdSettings, *, may_only_write: bool = False) -> None:
    """See at a start whether etcd lets this client in; one that is away is no reason to wait.

    Args:
        settings: Where.
        may_only_write: Whether the entries need not be readable.

    Raises:
        InputError: A server answered, and refuses; or a file that is named can't be used.
    """
    access = settings.load_access()
    async with aiohttp.ClientSession(trust_env=False) as session:
        for url in settings.urls:
            client = EtcdClient(session, url, settings.timeout_s, access)
            try:
                await client.look_below(settings.prefix)
            except UnavailableError:
                continue
            except RefusedError as error:
                if not (may_only_write and "permission denied" in str(error)):
                    raise InputError(str(error)) from error
            return


class EtcdView:
    """Entries as members, whatever they say. Pure."""

    def __init__(self, prefix: str) -> None:
        """Know none."""
        self._prefix = prefix
        self._members: dict[str, Member] = {}
        self._kept_until_s: dict[str, float] = {}
        self.num_bad = 0
        """Values that were no member; the last good one of that key stays."""

    @property
    def members(self) -> list[Member]:
        """All of them, by name."""
        return [self._members[key] for key in sorted(self._members)]

    @property
    def num_kept(self) -> int:
        """Members that are missing in etcd and stay for a while."""
        return len(self._kept_until_s)

    def resync(self, entries: Iterable[Entry], now_s: float, *, keep_s: float) -> None:
        """All entries as they are now; what is missing stays for ``keep_s`` at most."""
        found = {entry.key for entry in entries}
        for key in [key for key in self._members if key not in found]:
            if now_s >= self._kept_until_s.setdefault(key, now_s + keep_s):
                self._forget(key)
        self.change(entries)

    def change(self, entries: Iterable[Entry]) -> None:
        """Entries that were written or deleted, in their order."""
        for entry in entries:
            if entry.value is None:
                self._forget(entry.key)
                continue
            self._kept_until_s.pop(entry.key, None)
            try:
                self._members[entry.key] = self._parse(entry.key, entry.value)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                self.num_bad += 1
                log.warning("an entry of etcd is no engine. key=%s reason=%s", entry.key, error)

    def _forget(self, key: str) -> None:
        self._members.pop(key, None)
        self._kept_until_s.pop(key, None)

    def _parse(self, key: str, value: bytes) -> Member:
        if len(value) > VALUE_BYTES_MAX:
            raise ValueError(f"it has more than {VALUE_BYTES_MAX} bytes")
        member = msgspec.json.decode(value, type=Member)
        # The key is the identity: an entry can't speak for another one's name.
        return msgspec.structs.replace(member, name=key.removeprefix(self._prefix))


class EtcdSource:
    """The shell around `EtcdView`: one task that reads and watches."""

    def __init__(
        self, settings: EtcdSettings, clock: Clock, found: Callable[[Sequence[Member]], None]
    ) -> None:
        """Have nothing open; ``found`` gets all members whenever they may have changed.

        Raises:
            InputError: A file that the settings name can't be used.
        """
        self._settings, self._clock, self._found = settings, clock, found
        self._access = settings.load_access()
        self.view = EtcdView(settings.prefix)
        self.is_connected = False
        self.away = asyncio.Event()
        """Set while etcd does not answer."""
        self.num_outages = 0
        self._has_been_away = False

    async def run(self) -> None:
        """Follow until cancelled."""
        num_failures = 0
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(
            connector=connector, trust_env=False, read_bufsize=LINE_BYTES_MAX
        ) as session:
            while True:
                url = self._settings.urls[num_failures % len(self._settings.urls)]
                try:
                    client = EtcdClient(session, url, self._settings.timeout_s, self._access)
                    await self._follow(client)
                except (UnavailableError, RefusedError) as error:
                    self._lost(error)
                    await asyncio.sleep(PAUSES_S[min(num_failures, len(PAUSES_S) - 1)])
                    num_failures += 1
                else:
                    num_failures = 0

    async def _follow(self, client: EtcdClient) -> None:
        """Read all, then watch for a while."""
        prefix = self._settings.prefix
        found = await client.find_below(prefix)
        keep_s = self._settings.keep_s if self._has_been_away else 0.0
        self.view.resync(found.entries, self._clock.now_s(), keep_s=keep_s)
        # Once those that were kept have come back or gone, a missing entry means what it says.
        self._has_been_away = self._has_been_away and self.view.num_kept > 0
        self._reached(client)
        self._found(self.view.members)
        try:
            async with asyncio.timeout(self._settings.resync_s):
                watch = client.watch(prefix, found.revision + 1)
                async with contextlib.aclosing(watch):
                    async for entries in watch:
                        self.view.change(entries)
                        self._found(self.view.members)
        except TimeoutError:
            return

    def _reached(self, client: EtcdClient) -> None:
        if not self.is_connected:
            self.is_connected = True
            self.away.clear()
            log.info("etcd answers. members=%d", len(self.view.members))

    def _lost(self, error: UnavailableError | RefusedError) -> None:
        self._has_been_away = True
        if self.is_connected or not self.num_outages:
            self.num_outages += 1
            log.warning("etcd is away, the last known fleet stays. reason=%s", error)
        self.is_connected = False
        self.away.set()
