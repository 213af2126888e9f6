"""Every test of the relay runs twice: with the compiled part, and as if it had not been built."""

import pytest

from kvkeep.router.relay import exchange, framing, plain, upstream


@pytest.fixture(autouse=True, params=["compiled", "in Python"])
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "compiled":
        assert plain.plain_request is not None, "build the extension: make test does"
        return
    for name in ("plain_request", "plain_response", "whole_chunks"):
        monkeypatch.setattr(framing, name, None)
    monkeypatch.setattr(plain, "find_tokens", None)
    monkeypatch.setattr(exchange, "plain_response", None)
    monkeypatch.setattr(upstream, "Pump", None)
