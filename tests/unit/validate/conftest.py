"""A fake engine behind every endpoint, and no waiting."""

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore
from kvkeep.testing.fake_transport import fake_transport
from kvkeep.validate import load, runner
from kvkeep.validate.capability import probe
from kvkeep.validate.load import Endpoint
from kvkeep.validate.prompts import load_words
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subject import Subject
from kvkeep.validate.suite.base import Context

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


MakeContext = Callable[..., Awaitable[Context]]


@pytest.fixture
def make_context(connect: Connect, tmp_path: Path) -> MakeContext:
    """Gives a suite's context around fake engines; the first one is under test."""

    async def make(
        fake: FakeEngine,
        *,
        settings: CheckSettings | None = None,
        named: Collection[str] = (),
        **parts: Any,
    ) -> Context:
        engine = connect(fake)
        ids = itertools.count(1)
        subject = Subject(
            engine,
            await probe(engine),
            connect(fake) if fake.store is not None else None,
            **parts,
        )
        return Context(
            subject,
            settings or CheckSettings(),
            load_words(),
            new_run_id=lambda: f"run-{next(ids)}",
            results=tmp_path / "results",
            named=frozenset(named),
        )

    return make
