"""The few calls of etcd that membership needs, over its JSON gateway (etcd 3.4 and later).

etcd serves the same API as JSON over HTTP on the same port (etcd docs, "API reference: gRPC
gateway"), so no client library and no protobuf is needed. Keys and values are base64; 64-bit
integers are strings. Runs on the event loop; every call but ``watch`` has a time limit.
"""

import base64
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from kvkeep.model.errors import UnavailableError

KEYS_MAX = 4096
"""Entries below a prefix; what is beyond is not asked for."""
LINE_BYTES_MAX = 4 << 20
"""Of one message of a watch: many keys may change in one transaction."""


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
    """Calls to one etcd server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, timeout_s: float) -> None:
        """Use a session of the caller; nothing is opened here."""
        self._session, self._url = session, url.rstrip("/")
        self._timeout_s = timeout_s

    async def find_below(self, prefix: str) -> Found:
        """Every entry whose key begins with a prefix.

        Raises:
            UnavailableError: etcd does not answer, or says something else.
        """
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
                f"{self._url}/v3/watch", json=request, timeout=timeout
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
        """Write a key that goes when its lease ends.

        Raises:
            UnavailableError: It may or may not have been written.
        """
        await self._call(
            "kv/put", {"key": _b64(key.encode()), "value": _b64(value), "lease": lease_id}
        )

    async def grant(self, ttl_s: int) -> str:
        """A new lease.

        Raises:
            UnavailableError: There is none.
        """
        told = await self._call("lease/grant", {"TTL": str(ttl_s)})
        if "ID" not in told:
            raise UnavailableError(f"etcd at {self._url} grants no lease")
        return str(told["ID"])

    async def keep_alive(self, lease_id: str) -> bool:
        """Have a lease begin its time anew.

        Returns:
            Whether it is still there.

        Raises:
            UnavailableError: Nothing can be said of it.
        """
        told = await self._call("lease/keepalive", {"ID": lease_id})
        return int(told.get("result", {}).get("TTL", 0)) > 0

    async def revoke(self, lease_id: str) -> None:
        """End a lease and all keys under it.

        Raises:
            UnavailableError: It ends by itself, later.
        """
        await self._call("lease/revoke", {"ID": lease_id})

    async def _call(self, what: str, request: Mapping[str, Any]) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with self._session.post(
                f"{self._url}/v3/{what}", json=request, timeout=timeout
            ) as answer:
                answer.raise_for_status()
                told = json.loads(await answer.read())
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UnavailableError(f"etcd at {self._url} does not answer: {error!r}") from error
        if not isinstance(told, dict):
            raise UnavailableError(f"etcd at {self._url} answers nonsense")
        return told


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
