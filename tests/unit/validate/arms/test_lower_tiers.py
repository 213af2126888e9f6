"""Tiers are emptied by asking the daemon, and waited for until they have what they were given."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvkeep.client.connection import Connection
from kvkeep.model.errors import UnavailableError
from kvkeep.validate.arms import LowerTiers, TierPlaces, lower_tiers

PLACES = TierPlaces("/run/daemon.sock", ("disk",), ("valkey",))


class FakeDaemon:
    """Says of itself what it is told to, one answer after the other; the last one stays."""

    def __init__(self, *movements: dict[str, Any]) -> None:
        self._movements = list(movements)
        self.num_asked = 0

    async def get_json(self, path: str) -> dict[str, Any]:
        assert path == "/status"
        self.num_asked += 1
        first = self._movements[0]
        if len(self._movements) > 1:
            del self._movements[0]
        return {"movement": first}


def movement(*, waiting: int = 0, queued: int = 0, read: int = 0) -> dict[str, Any]:
    names = ("disk", "valkey")
    tiers = [{"name": n, "queued_bytes": queued, "reads": {"num_done": read}} for n in names]
    return {"cascades_waiting": waiting, "tiers": tiers}


def tiers_of(daemon: FakeDaemon) -> LowerTiers:
    return LowerTiers(PLACES, daemon)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for."""
    monkeypatch.setattr(lower_tiers, "PAUSE_S", 0.0)


async def test_blocks_on_their_way_down_are_waited_for() -> None:
    """Neither what is to be written nor what is being written may be emptied under way."""
    daemon = FakeDaemon(movement(waiting=3), movement(queued=10), movement())

    await tiers_of(daemon).settle()

    assert daemon.num_asked == 3


async def test_a_tier_that_never_settles_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait ends, with a sentence."""
    monkeypatch.setattr(lower_tiers, "READINGS_MAX", 4)

    with pytest.raises(UnavailableError, match="still being written"):
        await tiers_of(FakeDaemon(movement(waiting=1))).settle()


async def test_reads_are_counted_by_tier() -> None:
    """Only of the tiers that are named; a daemon without tiers has read nothing."""
    assert await tiers_of(FakeDaemon(movement(read=7))).num_read(["disk"]) == 7
    assert await tiers_of(FakeDaemon(movement(read=7))).num_read(["disk", "valkey"]) == 14
    assert await tiers_of(FakeDaemon({})).num_read(["disk"]) == 0


class FakeConnection:
    """Stands for a session with the daemon."""

    is_closed = False

    def next_request_id(self) -> int:
        return 1

    def close(self) -> None:
        FakeConnection.is_closed = True


def answered(monkeypatch: pytest.MonkeyPatch, *parts: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Have the daemon answer with these parts, request by request; returns what was asked."""
    asked: list[list[str]] = []
    upcoming = iter(parts)

    def told(_connection: object, request: Any) -> Iterator[dict[str, Any]]:
        asked.append(request.tiers)
        yield from next(upcoming)

    def connect(path: str, *_: object) -> FakeConnection:
        assert path == PLACES.socket
        return FakeConnection()

    monkeypatch.setattr(lower_tiers, "told", told)
    monkeypatch.setattr(Connection, "open", connect)
    return asked


async def test_what_is_lent_is_cleared_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that were kept because they are lent are asked for again."""
    kept = {"tier": "pool", "num_kept": 2}
    asked = answered(monkeypatch, [kept], [{**kept, "num_kept": 0}])

    await tiers_of(FakeDaemon(movement())).clear(["pool", "disk"])

    assert asked == [["pool", "disk"]] * 2
    assert FakeConnection.is_closed


async def test_a_tier_that_can_not_be_cleared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks would come back; the daemon's reason is passed on."""
    answered(monkeypatch, [{"tier": "valkey", "left_out": "no answer"}])

    with pytest.raises(UnavailableError, match="valkey can't be cleared: no answer"):
        await tiers_of(FakeDaemon(movement())).clear(["valkey"])
