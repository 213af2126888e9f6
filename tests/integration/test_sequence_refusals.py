"""Requests for sequences that can't be: one sentence, a status that fits, and nothing changed."""

import json
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from kvkeep.model.errors import InputError, RefusedError
from tests.integration.daemons import Daemon
from tests.integration.sequences import (
    KEY_TEXT,
    body_of,
    client_of,
    head_of,
    layers,
    running_listener,
    status_of,
)


@pytest.fixture(scope="module")
def keyless() -> Iterator[Daemon]:
    """A daemon without a key."""
    with running_listener() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def keyed() -> Iterator[Mapping[str, Daemon]]:
    """One daemon, which asks for a key."""
    with running_listener(has_key=True) as one:
        yield {"one": one}


BODY = body_of(layers(1, 3))
ONE = "/v1/sequences/one"
REFUSED = [
    (400, head_of("PUT", ONE, 3) + b"abc"),
    (400, head_of("PUT", ONE, len(BODY) - 1) + BODY[:-1]),
    (400, head_of("PUT", ONE, len(BODY) + 1) + BODY + b"x"),
    (400, head_of("PUT", ONE, 0)),
    (400, head_of("PUT", ONE, 16) + b"\xff" * 16),
    (400, head_of("POST", f"{ONE}?expected_length=-1", len(BODY)) + BODY),
    (400, head_of("POST", f"{ONE}?create=maybe", len(BODY)) + BODY),
    (400, head_of("POST", f"{ONE}?unknown=1", len(BODY)) + BODY),
    (400, head_of("PUT", f"{ONE}?expected_length=3", len(BODY)) + BODY),
    (400, head_of("GET", f"{ONE}?layers=")),
    (400, head_of("GET", "/v1/sequences/a%2Fb")),
    (400, head_of("GET", "/v1/sequences/%2e%2e%00")),
    (404, head_of("GET", "/v1/sequences")),
    (404, head_of("GET", "/status")),
    (404, head_of("GET", f"{ONE}?layers=9")),
    (405, head_of("OPTIONS", ONE)),
    (409, head_of("POST", f"{ONE}?expected_length=4", len(BODY)) + BODY),
    (411, head_of("PUT", ONE, None, "Transfer-Encoding: chunked") + b"0\r\n\r\n"),
    (413, head_of("PUT", ONE, 1 << 40)),
    (422, head_of("PUT", ONE, len(BODY), f"X-Kvkeep-Digest: {'0' * 32}") + BODY),
    (422, head_of("POST", ONE, len(BODY), "X-Kvkeep-Digest: ä") + BODY),
    (415, head_of("PUT", ONE, len(BODY), "Content-Encoding: gzip") + BODY),
    (403, head_of("GET", ONE, None, "Origin: http://evil.test")),
    (403, head_of("GET", ONE).replace(b"127.0.0.1", b"evil.test")),
]


class TestRefusals:
    @pytest.mark.parametrize(("status", "request_bytes"), REFUSED)
    def test_a_wrong_request_is_refused_and_changes_nothing(
        self, keyless: Daemon, status: int, request_bytes: bytes
    ) -> None:
        """With one sentence that says why, if it is one that can be answered so."""
        made = layers(1, 3)
        with client_of({"only": keyless}) as client:
            client.put("one", made)
            found, answer = status_of(keyless, request_bytes)

            assert found == status
            told = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert told["code"] == status
            assert 10 < len(told["message"]) < 400
            assert client.get("one") == made

    def test_without_the_key_nothing_is_told(self, keyed: Mapping[str, Daemon]) -> None:
        """But that it is alive; a wrong key is none."""
        daemon = keyed["one"]
        for shown in ([], ["Authorization: Bearer wrong-key-of-tests"], ["Authorization: Basic x"]):
            assert status_of(daemon, head_of("GET", ONE, None, *shown))[0] == 401
            body = head_of("PUT", ONE, len(BODY), *shown) + BODY
            assert status_of(daemon, body)[0] == 401
        assert status_of(daemon, head_of("GET", "/health"))[0] == 200
        with client_of(keyed) as client, pytest.raises(RefusedError, match="send the key"):
            client.get("one")

        with client_of(keyed, key=KEY_TEXT) as client:
            assert client.get("one") is None

    def test_a_name_or_array_that_can_not_be_is_refused_at_home(
        self, keyed: Mapping[str, Daemon]
    ) -> None:
        """Nothing is sent."""
        with client_of(keyed, key=KEY_TEXT) as client:
            for wrong in (np.zeros((2, 2), np.float32), np.zeros((0, 1, 1), np.float32)):
                with pytest.raises(InputError):
                    client.put("flat", {0: (wrong, wrong)})
            assert client.get("flat") is None
