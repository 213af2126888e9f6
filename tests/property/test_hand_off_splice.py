"""Whatever a body looks like, only the named fields change, and parsers agree about the rest."""

import json
import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvkeep.router.handoff.splice import JsonObject, SpliceError

NAMES = ("max_tokens", "stream", "kv_transfer_params", "prompt", "", "ключ", 'a"b', "\\", "\n")
SPACE = st.text(" \t\n\r", max_size=3)
NUMBERS = st.sampled_from(
    ["0", "-0", "1.50", "1E+2", "1e-7", "12345678901234567890123", "-1.0e400", "0.1e1"]
)
PLAIN = st.sampled_from(["true", "false", "null"]) | NUMBERS


@st.composite
def spelled(draw: Callable[[st.SearchStrategy[str]], str], text: str) -> str:
    """A string in one of the ways in which JSON can write it."""
    written = []
    for letter in text:
        escaped = json.dumps(letter)[1:-1]
        way = draw(st.sampled_from(["plain", "escaped", "unicode"]))
        if way == "unicode" and ord(letter) < 0x10000:
            written.append(f"\\u{ord(letter):04x}")
        elif way == "plain" and escaped == letter:
            written.append(letter)
        else:
            written.append(
                escaped if letter in '"\\' or letter < " " or way == "escaped" else letter
            )
    return '"' + "".join(written) + '"'


TEXTS = st.text(string.printable + "é€𝄞{}[]", max_size=8).flatmap(spelled)


def join(draw: Any, opening: str, parts: list[str], closing: str) -> str:
    spaced = [draw(SPACE) + part + draw(SPACE) for part in parts]
    return opening + (",".join(spaced) or draw(SPACE)) + closing


@st.composite
def members(draw: Any, values: st.SearchStrategy[str], names: Any = TEXTS) -> str:
    """One name and its value, spaced as it comes."""
    return "".join((draw(names), draw(SPACE), ":", draw(SPACE), draw(values)))


@st.composite
def arrays(draw: Any, values: st.SearchStrategy[str]) -> str:
    return join(draw, "[", draw(st.lists(values, max_size=4)), "]")


@st.composite
def objects(draw: Any, values: st.SearchStrategy[str]) -> str:
    return join(draw, "{", draw(st.lists(members(values), max_size=4)), "}")


VALUES = st.recursive(PLAIN | TEXTS, lambda inner: arrays(inner) | objects(inner), max_leaves=12)
TOP_NAMES = st.sampled_from(NAMES).flatmap(spelled) | TEXTS


@st.composite
def bodies(draw: Any) -> bytes:
    """A JSON object, spelled in any way, names twice and all."""
    parts = draw(st.lists(members(VALUES, TOP_NAMES), max_size=6))
    return "".join((draw(SPACE), join(draw, "{", parts, "}"), draw(SPACE))).encode()


def pairs_of(body: bytes) -> list[tuple[str, Any]]:
    """Members as a reference parser sees them: numbers as they are spelled, none dropped."""
    parsed: list[tuple[str, Any]] = json.loads(
        body, parse_float=str, parse_int=str, object_pairs_hook=lambda pairs: pairs
    )
    return parsed


NEW = {"max_tokens": b"1", "kv_transfer_params": b'{"a": [1,  2.50]}', "absent": b"null"}


@given(bodies(), st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(sorted(NEW))))
@example(b'{"a":1,"stream":2,"stream":3}', {"stream"}, set())
@example(b'{"stream":1}', {"stream"}, {"absent"})
def test_the_result_is_what_a_parser_would_make_of_it(
    body: bytes, dropped: set[str], put: set[str]
) -> None:
    """Parsed anew, dropped members are gone, put ones have their value, the rest stays."""
    values = {name: NEW[name] for name in sorted(put)}
    edited = JsonObject(body).edited(values, drop=dropped - put)
    expected = [
        (name, _parsed(values[name]) if name in values else value)
        for name, value in pairs_of(body)
        if name in values or name not in dropped
    ]
    names = {name for name, _ in pairs_of(body)}
    expected += [(name, _parsed(value)) for name, value in values.items() if name not in names]

    assert pairs_of(edited) == expected


def _parsed(value: bytes) -> Any:
    return dict(pairs_of(b'{"value":%b}' % value))["value"]


@given(bodies(), st.sampled_from(sorted(NEW)))
def test_every_other_byte_stays(body: bytes, name: str) -> None:
    """What lies before, between and behind the values of the named member is left as it was."""
    looked_at = JsonObject(body)
    edited = looked_at.edited({name: b"\0"})
    spans = [(each.value, each.end) for each in looked_at.members if each.name == name]
    kept, at = [], 0
    for begin, end in spans:
        kept.append(body[at:begin])
        at = end
    kept.append(body[at:])

    if spans:
        assert edited.split(b"\0") == kept
    else:
        added = b'"%b":\0' % name.encode()
        front, _, back = edited.partition(added)
        assert front.removesuffix(b",") + back == body


@given(bodies())
def test_nothing_to_do_changes_nothing(body: bytes) -> None:
    """An edit of absent members gives the same bytes."""
    looked_at = JsonObject(body)

    assert looked_at.edited({}, replace={"absent": b"1"}, drop={"missing"}) == body


@given(bodies())
def test_what_is_dropped_takes_no_other_byte_along(body: bytes) -> None:
    """Without its members' bytes and their commas, a body keeps all of its white space."""
    looked_at = JsonObject(body)
    dropped = {each.name for each in looked_at.members}
    edited = looked_at.edited({}, drop=dropped)
    ends = [0, *(end for each in looked_at.members for end in (each.begin, each.end)), len(body)]
    between = [body[begin:end] for begin, end in zip(ends[::2], ends[1::2], strict=True)]

    assert edited == b"".join(part.replace(b",", b"") for part in between)


@given(bodies(), st.sampled_from(NAMES))
def test_a_value_is_found_as_it_is_written(body: bytes, name: str) -> None:
    """Of several alike the last is found, byte by byte."""
    found = JsonObject(body).find(name)
    expected = dict(pairs_of(body)).get(name, ...)

    assert (... if found is None else _parsed(found)) == expected
    assert found is None or found in body


@given(st.binary(max_size=40) | bodies().flatmap(lambda body: st.sampled_from(cut(body))))
def test_what_is_no_object_is_refused(body: bytes) -> None:
    """Bytes are taken only if a reference parser takes them for an object; no other error comes."""
    try:
        JsonObject(body)
    except SpliceError:
        return
    parsed = json.loads(body)

    assert isinstance(parsed, dict)


def cut(body: bytes) -> list[bytes]:
    """Damaged bodies."""
    return [body[:-1], body + b"}", body.replace(b":", b"", 1), body.replace(b'"', b"", 1), b"\xff"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"1",
        b'"{}"',
        b"{}{}",
        b'{"a":NaN}',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\xff"}',
        b'{"a":' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a":[' + b"[]," * 60_000 + b"[]]}",
    ],
)
def test_bodies_that_would_be_read_differently_are_refused(body: bytes) -> None:
    """No object, another encoding, or too much structure: one clear sentence."""
    with pytest.raises(SpliceError, match=r"^the body.*$"):
        JsonObject(body)
