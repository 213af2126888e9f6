"""``kvkeep check locality`` against daemons that keep sequences."""

from typing import Any

import pytest

from kvkeep.client.sequences import SequenceClient
from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_transport import fake_transport
from kvkeep.validate.capability import probe
from kvkeep.validate.load import Endpoint
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subject import Subject
from kvkeep.validate.suite.base import Context
from kvkeep.validate.suites import locality
from tests.integration.sequences import running_listener, url_of


async def checked(urls: tuple[str, ...]) -> Any:
    async with Endpoint("http://fake", transport=fake_transport(FakeEngine())) as engine:
        subject = Subject(engine, await probe(engine), sequence_urls=urls)
        context = Context(subject, CheckSettings(), (), new_run_id=lambda: "run")
        (report,) = await locality.run(context)
    return report


async def test_daemons_that_keep_sequences_pass() -> None:
    """Two daemons: values, growth, layers, refusals, appends at once, places."""
    with running_listener() as one, running_listener() as two:
        report = await checked((url_of(one), url_of(two)))

    assert [(c.name, c.detail) for c in report.checks if c.ok is not True] == []
    assert report.outcome == "passed"
    assert len([name for name in report.numbers if name.startswith("found_at_")]) == 2


async def test_lost_appends_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Appends that overwrite each other are noticed: the pieces are counted."""

    def put_instead(client: Any, name: str, layers: Any, **_: Any) -> Any:
        return client.put(name, layers)

    monkeypatch.setattr(SequenceClient, "append", put_instead)
    with running_listener() as one:
        report = await checked((url_of(one),))

    broken = {check.name for check in report.checks if check.ok is False}
    assert {"appends stand in order", "appends at once are kept"} <= broken
