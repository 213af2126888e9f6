"""The tiers of a daemon that a check may empty, so that KV has to come from a certain one.

Only of a stack that the check started itself: what is emptied is gone for everybody.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.client.connection import Connection
from kvkeep.client.told import told
from kvkeep.model.errors import UnavailableError
from kvkeep.protocol import messages as m
from kvkeep.protocol.versions import VERSION
from kvkeep.validate.load import Endpoint

POOL = "pool"
GREETING_S = 5.0
READINGS_MAX = 600
PAUSE_S = 0.1
"""A tier that has not written what it was given within a minute is not waited for any longer."""
CLEAR_ATTEMPTS_MAX = 50


@dataclass(frozen=True, slots=True)
class TierPlaces:
    """Where a daemon is told to empty its tiers, and what it calls them."""

    socket: str
    """Its control socket."""
    disks: tuple[str, ...] = ()
    """Names of tiers on this machine."""
    remotes: tuple[str, ...] = ()
    """Names of tiers behind a network."""


class LowerTiers:
    """Empties tiers, and counts what was read from them."""

    def __init__(self, places: TierPlaces, daemon: Endpoint) -> None:
        """Describe them; nothing is sent.

        Args:
            places: What they are called.
            daemon: Where the daemon says how far it is.
        """
        self.disks, self.remotes = places.disks, places.remotes
        self._socket, self._daemon = places.socket, daemon

    async def settle(self) -> None:
        """Wait until everything that is to be written below the pool is there.

        Raises:
            UnavailableError: It is not within a minute, or the daemon does not answer.
        """
        for _ in range(READINGS_MAX):
            movement = (await self._daemon.get_json("/status")).get("movement") or {}
            queued = [tier["queued_bytes"] for tier in movement.get("tiers", ())]
            if not movement.get("cascades_waiting") and not any(queued):
                return
            await asyncio.sleep(PAUSE_S)
        raise UnavailableError(
            "Blocks are still being written below the pool after a minute: see the daemon's log."
        )

    async def clear(self, names: Sequence[str]) -> None:
        """Forget every block in these tiers.

        Raises:
            UnavailableError: The daemon can't, or blocks stay lent; some may be gone.
        """
        num_kept = 0
        for _ in range(CLEAR_ATTEMPTS_MAX):
            num_kept = await asyncio.to_thread(_clear, self._socket, names)
            if not num_kept:
                return
            await asyncio.sleep(PAUSE_S)
        raise UnavailableError(f"{num_kept} blocks are lent all the time and can't be cleared.")

    async def num_read(self, names: Sequence[str]) -> int:
        """Blocks that were read from these tiers since the daemon's start.

        Raises:
            UnavailableError: The daemon does not answer.
        """
        movement = (await self._daemon.get_json("/status")).get("movement") or {}
        return sum(
            (tier.get("reads") or {}).get("num_done", 0)
            for tier in movement.get("tiers", ())
            if tier["name"] in names
        )


def _clear(socket: str, names: Sequence[str]) -> int:
    """Clear tiers once; returns how many blocks could not go because they are lent."""
    num_kept = 0
    connection = Connection.open(socket, m.Hello(VERSION, "tool", "check"), GREETING_S)
    try:
        for part in told(connection, m.ClearTiers(connection.next_request_id(), list(names))):
            if "left_out" in part:
                raise UnavailableError(
                    f"The tier {part['tier']} can't be cleared: {part['left_out']}"
                )
            num_kept += part["num_kept"]
    finally:
        connection.close()
    return num_kept
