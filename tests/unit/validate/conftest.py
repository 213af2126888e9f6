"""A fake engine behind every endpoint, and no waiting."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore
from kvkeep.testing.fake_transport import fake_transport
from kvkeep.validate import load, runner
from kvkeep.validate.load import Endpoint

Connect = Callable[..., Endpoint]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polling goes on at once; what it waits for has happened already."""
    monkeypatch.setattr(runner, "SETTLE_PAUSE_S", 0.0)
    monkeypatch.setattr(load, "RESET_PAUSE_S", 0.0)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Gives endpoints to fake engines, and closes them."""
    async with AsyncExitStack() as stack:

        def make(engine: FakeEngine, **more: Any) -> Endpoint:
            endpoint = Endpoint("http://fake", transport=fake_transport(engine), **more)
            stack.push_async_callback(endpoint.aclose)
            return endpoint

        yield make


@pytest.fixture
def store() -> FakeStore:
    """A cache outside the engines."""
    return FakeStore()
