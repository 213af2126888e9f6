"""What a caller is told about an answer, and how a body goes out."""

import json

import pytest
import xxhash

from kvkeep.client.sequence_calls import RUN_BYTES, Reply, _in_runs, refusal_of
from kvkeep.model.errors import (
    CapacityError,
    CorruptDataError,
    InputError,
    KvkeepError,
    RefusedError,
    UnavailableError,
)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InputError),
        (411, InputError),
        (401, RefusedError),
        (404, RefusedError),
        (409, RefusedError),
        (413, CapacityError),
        (429, CapacityError),
        (507, CapacityError),
        (408, UnavailableError),
        (422, CorruptDataError),
        (500, UnavailableError),
        (302, UnavailableError),
    ],
)
def test_a_refusal_says_what_to_do(status: int, kind: type[KvkeepError]) -> None:
    """Mend it, look again, make room, or come back; in the daemon's own words."""
    body = json.dumps({"error": {"message": "so it is", "code": status}}).encode()
    error = refusal_of(Reply(status, memoryview(body)))

    assert type(error) is kind
    assert str(error) == "so it is"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": 1}', b'{"error": {}}'])
def test_a_stranger_is_told_by_its_status(body: bytes) -> None:
    """Whatever it says."""
    assert "the daemon answered 400" in str(refusal_of(Reply(400, memoryview(body))))


@pytest.mark.parametrize("sizes", [[], [1], [1] * 100, [RUN_BYTES], [3, RUN_BYTES + 1, 4, 5]])
def test_a_body_goes_out_in_order(sizes: list[int]) -> None:
    """Short parts together, long ones as they are."""
    parts = [bytes([number % 256]) * size for number, size in enumerate(sizes)]
    runs = list(_in_runs(parts))

    assert b"".join(runs) == b"".join(parts)
    assert len([run for run in runs if run]) <= 1 + 2 * sum(size >= RUN_BYTES for size in sizes)


@pytest.mark.parametrize("digest", [None, "", "0" * 32])
def test_an_answer_that_was_changed_on_the_way_is_refused(digest: str | None) -> None:
    """Also one of which nobody says what its bytes sum up to."""
    with pytest.raises(CorruptDataError, match="ask for it again"):
        Reply(200, memoryview(b"bytes"), digest).check()

    Reply(200, memoryview(b"bytes"), xxhash.xxh3_128_hexdigest(b"bytes")).check()
