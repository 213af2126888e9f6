"""A store on a host of its own, which other hosts share: an S3 server or Mooncake's master."""

import contextlib
import http.client
from typing import Literal

from tests.servers.hosts import Host
from tests.servers.mooncake import MIB, SHORT_TTL_S, MooncakeStore
from tests.servers.seaweed import BUCKET, SeaweedServer

Kind = Literal["object_store", "mooncake"]
KINDS: tuple[Kind, ...] = ("object_store", "mooncake")


class RemoteSeaweed(SeaweedServer):
    """The S3 server on a host of its own, asked from this thread only."""

    def _is_ready(self) -> bool:
        try:
            self._ask("POST", f"/buckets/{BUCKET}/")
            self._ask("POST", f"/buckets/{BUCKET}/ready")
            listing = http.client.HTTPConnection(self._host, self.port, timeout=20)
            with contextlib.closing(listing):
                listing.request("GET", "/")
                return listing.getresponse().status in (200, 403)
        except (OSError, http.client.HTTPException):
            return False


class SharedStore:
    """The server on the third host; it may be killed and started again."""

    def __init__(self, kind: Kind, host: Host, *, segment_bytes: int = 64 * MIB) -> None:
        self._host = host
        self._kind = kind
        self._segment_bytes = segment_bytes
        self._mooncake = MooncakeStore(
            host=host.address, within=host.within, client_ttl_s=SHORT_TTL_S
        )
        self._seaweed = RemoteSeaweed(host=host.address, within=host.within)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._host.entered():
            if self._kind == "mooncake":
                self._mooncake.start_master()
            else:
                self._seaweed.run()

    def kill(self) -> None:
        """End it without warning."""
        self._mooncake.master.kill()
        self._seaweed.kill()

    def end(self) -> None:
        """End it; nothing of it is left."""
        self._mooncake.stop()
        self._seaweed.stop()

    def tier(self, user: Host, *, timeout_s: float = 1.0) -> dict[str, object]:
        """What the daemon of a host is told of it."""
        waits = {"timeout_s": timeout_s, "deadline_s": 2 * timeout_s}
        if self._kind == "mooncake":
            # Each host lends memory to the store: to lose it is to lose blocks as well.
            place = {"master": self._mooncake.address, "local_hostname": user.address}
            return {"kind": self._kind, **place, "segment_bytes": self._segment_bytes, **waits}
        place = {"url": f"s3://{BUCKET}", "endpoint": self._seaweed.endpoint}
        return {"kind": self._kind, **place, "allow_http": True, **waits}
