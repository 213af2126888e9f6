"""Routing: a ring passes; routers that forget, lean to one side, or move strangers' keys do not."""

import json
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.validate.load import Endpoint
from kvkeep.validate.suites import routing
from kvkeep.validate.suites.routing import KEY_HEADER, run
from tests.unit.validate.conftest import MakeContext

Choose = Callable[[str, list[str], int], str]


def by_rank(key: str, workers: list[str], _count: int) -> str:
    """Rendezvous hashing: only a leaver's keys move."""
    return max(
        workers, key=lambda worker: zlib.crc32(f"{key}|{worker}".encode()) * 2654435761 % 2**32
    )


def by_rest(key: str, workers: list[str], _count: int) -> str:
    """Division: nearly all keys move when one leaves."""
    return workers[zlib.crc32(key.encode()) % len(workers)]


def in_turn(_key: str, workers: list[str], count: int) -> str:
    """No memory at all."""
    return workers[count % len(workers)]


def leaning(key: str, workers: list[str], _count: int) -> str:
    """Eight keys in ten to the first."""
    return workers[0] if zlib.crc32(key.encode()) % 10 < 8 else workers[-1]


NUM_KEYS = 400


@pytest.fixture(autouse=True)
def few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to tell even from uneven."""
    monkeypatch.setattr(routing, "NUM_KEYS", {"small": NUM_KEYS})


class FakeAdmin:
    """A router's admin address."""

    def __init__(self, choose: Choose, num_workers: int = 3) -> None:
        self.choose, self.count = choose, 0
        self.draining = {f"w{i}": False for i in range(num_workers)}

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/workers":
            rows = [{"name": n, "state": "ready"} for n, out in self.draining.items() if not out]
            return httpx.Response(200, json=rows)
        if request.method == "PATCH":
            name = request.url.path.rpartition("/")[2]
            self.draining[name] = json.loads(request.content)["drain"]
            return httpx.Response(200, json={})
        self.count += 1
        key = request.headers.get(KEY_HEADER)
        ready = [name for name, out in self.draining.items() if not out]
        chosen = self.choose(key, ready, self.count)
        return httpx.Response(200, json={"endpoint": chosen, "key": key, "reason": "home"})


async def checked(make_context: MakeContext, admin: FakeAdmin) -> Any:
    endpoint = Endpoint("http://admin", transport=httpx.MockTransport(admin.answer))
    async with endpoint:
        (report,) = await run(await make_context(FakeEngine(), admin=endpoint))
    return report


def broken(report: Any) -> set[str]:
    return {check.name for check in report.checks if check.ok is False}


async def test_a_ring_passes(make_context: MakeContext) -> None:
    """Every key has a home, homes are even, a leaver's keys move and come back."""
    admin = FakeAdmin(by_rank)

    report = await checked(make_context, admin)

    assert (report.outcome, broken(report)) == ("passed", set())
    assert not any(admin.draining.values())
    assert 0 < report.numbers["moved_keys"] < report.numbers["keys"] / 2


@pytest.mark.parametrize(
    ("choose", "found"),
    [
        (in_turn, "same key, same engine"),
        (leaning, "no engine has most keys"),
        (leaning, "keys are spread evenly"),
        (leaning, "every engine is used"),
        (by_rest, "only a leaver's keys move"),
    ],
)
async def test_what_routers_do_wrong_is_found(
    make_context: MakeContext, choose: Choose, found: str
) -> None:
    """Each way to route badly breaks its own promise."""
    report = await checked(make_context, FakeAdmin(choose))

    assert found in broken(report)
    assert report.outcome == "failed"


async def test_one_engine_is_no_choice(make_context: MakeContext) -> None:
    """With a single engine nothing is proven."""
    report = await checked(make_context, FakeAdmin(by_rank, num_workers=1))

    assert report.outcome == "not-exercised"
