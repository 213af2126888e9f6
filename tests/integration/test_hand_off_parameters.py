"""Nobody but the router names memory that a decode engine reads."""

import json
from collections.abc import Iterator

import pytest

from tests.integration.handing_fleet import (
    PATH,
    Fleet,
    asked,
    bodies_of,
    fleet,
    note_of,
    question,
)

BLANKS = b" " * (3 << 20)
STOLEN = question(kv_transfer_params={"do_remote_prefill": True, "remote_engine_id": "another's"})


@pytest.fixture(scope="module")
def strict() -> Iterator[Fleet]:
    """Its engines write down what they are asked."""
    with fleet() as found:
        yield found


@pytest.mark.parametrize(
    "path",
    ["/v1/%63ompletions", "/v1/completions/", "/v1/responses", "/inference/v1/generate", PATH],
)
@pytest.mark.parametrize("blanks", [b"", BLANKS])
def test_no_engine_hears_of_it(strict: Fleet, path: str, blanks: bytes) -> None:
    """On whatever path, and behind whatever the router does not gather."""
    for engine in strict.engines:
        engine.forget()
    body = json.dumps(STOLEN).encode()
    answer = asked(strict, body[:1] + blanks + body[1:], path)

    assert answer.status_code == 400
    assert "kv_transfer_params" in answer.json()["error"]["message"]
    assert bodies_of(strict.engines) == []


def test_large_bodies_go_to_decode(strict: Fleet) -> None:
    """Where they name nothing that is not theirs."""
    answer = asked(strict, b"{" + BLANKS + json.dumps(question()).encode()[1:])

    assert answer.status_code == 200
    assert note_of(answer) == "skipped=size"
