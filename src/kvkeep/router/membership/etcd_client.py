"""The few calls of etcd that membership needs, over its JSON gateway (etcd 3.4 and later).

etcd serves the same API as JSON over HTTP on the same port (etcd docs, "API reference: gRPC
gateway"), so no client library and no protobuf is needed. Keys and values are base64; 64-bit
integers are strings. Runs on the event loop; every call but ``watch`` has a time limit.
"""

import base64
import json
import re
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from kvkeep.model.errors import RefusedError, UnavailableError
from kvkeep.router.membership.etcd_access import EtcdAccess

KEYS_MAX = 4096
"""Entries below a prefix; what is beyond is not asked for."""
LINE_BYTES_MAX = 4 << 20
"""Of one message of a watch: many keys may change in one transaction."""
WORDS_MAX = 300
"""Of what etcd says, in a sentence."""
HTTP_BAD, HTTP_NONSENSE = 400, 599
UNAUTHENTICATED = 401
REFUSALS = frozenset({400, UNAUTHENTICATED, 403})
"""Wrong passwords and nameless clients are 400 (etcd 3.5, api/v3rpc/rpctypes/error.go)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key and its value; of a deletion ``value`` is None."""

    key: str
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Found:
    """All keys below a prefix at one moment."""

    entries: tuple[Entry, ...]
    revision: int
    """A watch from the next one misses nothing."""


class EtcdClient:
    """Calls to one etcd server.

    Raises of every call: UnavailableError where it does not answer, RefusedError where it can't be
    trusted, or answers and does not let this client in.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, timeout_s: float, access: EtcdAccess
    ) -> None:
        """Use a session of the caller; nothing is opened here."""
        self._session, self._url = session, url.rstrip("/")
        self._timeout_s, self._access = timeout_s, access

    async def look_below(self, prefix: str) -> None:
        """See whether what lies below a prefix may be read."""
        await self._call("kv/range", _range_of(prefix) | {"limit": 1, "keys_only": True})

    async def find_below(self, prefix: str) -> Found:
        """Every entry whose key begins with a prefix."""
        told = await self._call("kv/range", _range_of(prefix) | {"limit": KEYS_MAX})
        try:
            entries = tuple(_entry(item) for item in told.get("kvs", ()))
            return Found(entries, int(told["header"]["revision"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UnavailableError(f"etcd at {self._url} answers nonsense") from error

    async def watch(self, prefix: str, revision: int) -> AsyncGenerator[list[Entry], None]:
        """What changes from a revision on, until the server ends it.

        It ends without an error when the revision was compacted away: ask anew then.

        Raises:
            UnavailableError: The connection broke.
        """
        request = {"create_request": _range_of(prefix) | {"start_revision": str(revision)}}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s)
        try:
            async with self._session.post(
                f"{self._url}/v3/watch",
                json=request,
                headers=self._headers,
                ssl=self._access.tls,
                timeout=timeout,
            ) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    result = json.loads(line)["result"]
                    if result.get("canceled"):
                        return
                    events = result.get("events")
                    if events:
                        yield [_change(event) for event in events]
        except (aiohttp.ClientError, OSError, KeyError, TypeError, ValueError) as error:
            raise UnavailableError(f"etcd at {self._url} ended the watch: {error!r}") from error

    async def put(self, key: str, value: bytes, lease_id: str) -> None:
        """Write a key that goes when its lease ends; after an error it may have been written."""
        await self._call(
            "kv/put", {"key": _b64(key.encode()), "value": _b64(value), "lease": lease_id}
        )

    async def grant(self, ttl_s: int) -> str:
        """A new lease."""
        told = await self._call("lease/grant", {"TTL": str(ttl_s)})
        if "ID" not in told:
            raise UnavailableError(f"etcd at {self._url} grants no lease")
        return str(told["ID"])

    async def keep_alive(self, lease_id: str) -> bool:
        """Have a lease begin its time anew.

        Returns:
            Whether it is still there.
        """
        told = await self._call("lease/keepalive", {"ID": lease_id})
        return int(told.get("result", {}).get("TTL", 0)) > 0

    async def revoke(self, lease_id: str) -> None:
        """End a lease and all keys under it; after an error it ends by itself, later."""
        await self._call("lease/revoke", {"ID": lease_id})

    @property
    def _headers(self) -> dict[str, str]:
        token = self._access.tokens.get(self._url)
        return {} if token is None else {"Authorization": token}

    async def _call(self, what: str, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._access.user and self._url not in self._access.tokens:
            await self._authenticate()
        status, told = await self._post(what, request)
        if status == UNAUTHENTICATED and self._access.user:
            await self._authenticate()
            status, told = await self._post(what, request)
        return self._checked(status, told)

    async def _authenticate(self) -> None:
        """Show the password, and have a token for it."""
        access = self._access
        access.tokens.pop(self._url, None)
        shown = {"name": access.user, "password": access.password}
        told = self._checked(*await self._post("auth/authenticate", shown))
        if not isinstance(told.get("token"), str):
            raise UnavailableError(f"etcd at {self._url} answers nonsense")
        access.tokens[self._url] = told["token"]

    async def _post(self, what: str, request: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return the status and what was said."""
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with self._session.post(
                f"{self._url}/v3/{what}",
                json=request,
                headers=self._headers,
                ssl=self._access.tls,
                timeout=timeout,
            ) as answer:
                status, text = answer.status, await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, ssl.SSLError) or "[SSL" in str(error):
                raise RefusedError(
                    f"etcd at {self._url} can't be reached by TLS: {_reason_of(error)}; see its "
                    "address, ca_file, and cert_file if it wants a certificate"
                ) from error
            raise UnavailableError(f"etcd at {self._url} does not answer: {error!r}") from error
        try:
            told = json.loads(text)
        except ValueError:
            told = {"message": text[:WORDS_MAX].decode(errors="replace").strip()}
            status = status if status >= HTTP_BAD else HTTP_NONSENSE
        return status, told if isinstance(told, dict) else {}

    def _checked(self, status: int, told: dict[str, Any]) -> dict[str, Any]:
        if status < HTTP_BAD:
            return told
        words = " ".join(str(told.get("message") or f"status {status}").split())
        words = words.removeprefix("etcdserver: ")[:WORDS_MAX]
        if status not in REFUSALS:
            raise UnavailableError(f"etcd at {self._url} answers: {words}")
        who = f"the user {self._access.user!r}" if self._access.user else "a client without a user"
        raise RefusedError(
            f"etcd at {self._url} refuses {who}: {words}; see user, password_file and its roles"
        )


def _reason_of(error: BaseException) -> str:
    """What went wrong with TLS, in its own words."""
    verified = getattr(error, "verify_message", "") or getattr(
        getattr(error, "certificate_error", None), "verify_message", ""
    )
    found = re.search(r"\[SSL[^\]]*\]\s*([^(]+)", str(error))
    return str(verified or (found and found[1].strip()) or error)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _range_of(prefix: str) -> dict[str, str]:
    """Keys that begin with a prefix: up to the one whose last byte is one more."""
    first = prefix.encode()
    assert first
    assert first[-1] < 0xFF
    end = first[:-1] + bytes([first[-1] + 1])
    return {"key": _b64(first), "range_end": _b64(end)}


def _entry(item: Mapping[str, str]) -> Entry:
    key = base64.b64decode(item["key"]).decode(errors="replace")
    return Entry(key, base64.b64decode(item.get("value", "")))


def _change(event: Mapping[str, Any]) -> Entry:
    # PUT is the zero of its enumeration, and JSON of protobuf leaves zeros out.
    entry = _entry(event["kv"])
    return Entry(entry.key, None) if event.get("type") == "DELETE" else entry
