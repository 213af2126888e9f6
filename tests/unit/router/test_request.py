"""What keeps requests together, and in which order it is looked for."""

import pytest

from kvkeep.router.request import (
    KEY_BYTES_MAX,
    RequestView,
    find_key,
    find_key_header,
    find_model,
    parse_fields,
)

PLAIN = b"POST /v1/x HTTP/1.1\r\nHost: a\r\n\r\n"
IN_ORDER = [
    (b"X-Session-Id: one\r\n", b"", b"one"),
    (b"X-User-ID: two\r\n", b"", b"two"),
    (b"x-kvkeep-key: three\r\n", b"", b"three"),
    (b"", b'"session_id": "four"', b"four"),
    (b"", b'"user": "five"', b"five"),
    (b"", b'"prompt_cache_key": "six"', b"six"),
    (b"", b'"conversation": {"id": "seven"}', b"seven"),
    (b"", b'"messages": [{"role": "user"}]', b'[{"role": "user"}]'),
    (b"", b'"prompt": "nine"', b'"nine"'),
]


def key_of(fields: bytes, body: bytes) -> bytes | None:
    """The key of a request with these header lines and this body."""
    found = find_key_header(PLAIN[:-2] + fields + b"\r\n")
    read = parse_fields(body)
    return find_key(read) if found is None and read is not None else found


@pytest.mark.parametrize("first", range(len(IN_ORDER)))
def test_the_first_that_is_there_counts(first: int) -> None:
    """Headers before fields of the body, and the prompt's beginning last."""
    rest = IN_ORDER[first:]
    fields = b"".join(line for line, _, _ in reversed(rest))
    body = b"{" + b", ".join(field for _, field, _ in reversed(rest) if field) + b"}"

    assert key_of(fields, body) == IN_ORDER[first][2]


def test_what_is_new_with_each_request_is_no_key() -> None:
    """Ids of requests and traces would spread a conversation over all engines."""
    fields = b"X-Request-Id: 1\r\ntraceparent: 00-1\r\nX-Correlation-Id: 2\r\n"

    assert key_of(fields, b'{"id": "3", "request_id": "4", "temperature": 1}') is None


def test_conversations_stay_together_as_they_grow() -> None:
    """Only how a prompt begins counts, not what is added to it."""
    begin = b'{"messages": [{"role": "system", "content": "' + b"x" * KEY_BYTES_MAX

    assert key_of(b"", begin + b'"}]}') == key_of(b"", begin + b'"}, {"role": "user"}]}')


@pytest.mark.parametrize("body", [b"", b"[]", b"nothing", b'{"user": ', b"\xff", b"[" * 100_000])
def test_a_body_that_cannot_be_read_has_no_key(body: bytes) -> None:
    """It goes to an engine all the same, which says what is wrong with it."""
    assert key_of(b"", body) is None


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "a"}', "a"),
        (b'{"model": "a", "model": "b"}', "b"),
        (b'{"model": 5}', None),
        (b'{"model": null}', None),
        (b"{}", None),
    ],
)
def test_the_model_is_the_one_that_the_engine_will_read(body: bytes, model: str | None) -> None:
    """Of two the last one, as in Python's own reader of JSON."""
    fields = parse_fields(body)

    assert fields is not None
    assert find_model(fields) == model


def test_odd_values_are_passed_over() -> None:
    """A list is no name; a number is."""
    assert key_of(b"", b'{"session_id": [], "user": {"id": []}, "conversation": 7}') == b"7"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([(None, False)], None),
        ([(7, False)], 7),
        ([(None, True)], 0),
        ([(7, False), (None, False)], 7),
        ([(None, True), (7, False)], 7),
        ([(None, True), (None, False)], None),
        ([(7, False), (None, True)], 0),
    ],
)
def test_what_a_prompt_cost_is_what_was_said_last(
    answers: list[tuple[int | None, bool]], expected: int | None
) -> None:
    """Of a hand-off's two engines, or of one after another that failed; an error costs nothing."""
    view = RequestView("/v1/completions")
    for num_tokens, is_error in answers:
        view.answered(num_tokens, is_error=is_error)

    assert view.num_counted == expected
