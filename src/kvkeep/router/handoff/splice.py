"""Fields of a JSON object's top level, edited in its bytes; every other byte stays as it was.

A body is never decoded and encoded again: numbers keep their spelling, keys their order and their
duplicates, text its escapes, and what an engine understands that this router does not know of goes
through. What is not one JSON object in UTF-8 is refused: two programs that read a body differently
would compute one prompt and answer another.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

BRACKETS_MAX: Final = 50_000
"""Of one body: a prompt has few, and all of them cost the event loop some 30 ms."""
DEPTH_MAX: Final = 256
"""Of nested values; engines' own parsers give up not far beyond."""

_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_KEY = re.compile(_SPACE + rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE, re.DOTALL)
_TEXT = re.compile(_STRING, re.DOTALL)
_PLAIN = re.compile(rb"[^\s,}]++")
_BRACKET = re.compile(rb'[^"\[\]{}]*+(?:' + _STRING + rb'[^"\[\]{}]*+)*+([\[\]{}])', re.DOTALL)
_AFTER = re.compile(_SPACE + rb"([,}])")
_checker = msgspec.json.Decoder(dict[str, msgspec.Raw])


class SpliceError(Exception):
    """A body that can't be edited; the text says what to send instead."""


@dataclass(slots=True)
class Member:
    """One name and value, by where they lie."""

    name: str
    begin: int
    """Of the name's opening quote."""
    value: int
    """Of the value's first byte."""
    end: int
    """Behind the value's last byte."""


class JsonObject:
    """A JSON object's bytes, and where its members are."""

    __slots__ = ("_body", "_commas", "_end", "members")

    def __init__(self, body: bytes) -> None:
        """Look through it.

        Raises:
            SpliceError: It is no JSON object, or none that could be read quickly and one way only.
        """
        _check(body)
        self._body = body
        self.members: list[Member] = []
        self._commas: list[int] = []
        """Where each lies; one fewer than members."""
        at = body.index(b"{") + 1
        scan = _Scan(body)
        while (key := _KEY.match(body, at)) is not None:
            end = scan.value_end(key.end())
            self.members.append(Member(_name(key[1]), key.start(1), key.end(), end))
            after = _AFTER.match(body, end)
            assert after is not None, "the body was checked"
            at = after.end()
            if after[1] == b"}":
                break
            self._commas.append(after.start(1))
        self._end = at - 1 if self.members else body.index(b"}", at)

    def find(self, name: str) -> bytes | None:
        """The value of a member as it stands there; of several, what most parsers take: the last.

        None if there is none.
        """
        for member in reversed(self.members):
            if member.name == name:
                return self._body[member.value : member.end]
        return None

    def edited(
        self,
        put: Mapping[str, bytes],
        *,
        replace: Mapping[str, bytes] | None = None,
        drop: Collection[str] = (),
    ) -> bytes:
        """The object's bytes with some members changed.

        Args:
            put: Values, as JSON, of members that are there afterwards: where they were, each of
                several alike, or else at the end.
            replace: The same, only where they are there already.
            drop: Members that are not there afterwards.
        """
        values = {**(replace or {}), **put}
        kept = [member.name not in drop or member.name in values for member in self.members]
        last = max((idx for idx, is_kept in enumerate(kept) if is_kept), default=-1)
        parts: list[bytes] = []
        at = 0
        for idx, member in enumerate(self.members):
            if not kept[idx]:
                parts.append(self._body[at : member.begin])
                at = member.end
            elif (value := values.get(member.name)) is not None:
                parts += (self._body[at : member.value], value)
                at = member.end
            if idx < len(self._commas) and (not kept[idx] or idx >= last):
                # A comma stays between two members that stay.
                comma = self._commas[idx]
                parts.append(self._body[at:comma])
                at = comma + 1
        parts.append(self._body[at : self._end])
        names = {member.name for member in self.members}
        new = [b'"%b":%b' % (name.encode(), put[name]) for name in put if name not in names]
        if new and last >= 0:
            parts.append(b",")
        return b"".join((*parts, b",".join(new), self._body[self._end :]))


class _Scan:
    """Finds where values end, in a body that was checked."""

    __slots__ = ("_body", "_num_brackets")

    def __init__(self, body: bytes) -> None:
        self._body, self._num_brackets = body, 0

    def value_end(self, at: int) -> int:
        body = self._body
        first = body[at : at + 1]
        if first not in (b"{", b"["):
            match = (_TEXT if first == b'"' else _PLAIN).match(body, at)
            assert match is not None, "the body was checked"
            return match.end()
        depth = 0
        while True:
            bracket = _BRACKET.match(body, at)
            assert bracket is not None, "the body was checked"
            at = bracket.end()
            depth += 1 if bracket[1] in b"[{" else -1
            if depth == 0:
                return at
            self._num_brackets += 1
            if depth > DEPTH_MAX or self._num_brackets > BRACKETS_MAX:
                raise SpliceError(
                    "the body's values are nested too deeply or too many: send a plainer one"
                )


def _check(body: bytes) -> None:
    """Refuse what is not one JSON object in UTF-8."""
    try:
        body.decode("utf-8")
        _checker.decode(body)
    except RecursionError as error:
        raise SpliceError("the body's values are nested too deeply: send a plainer one") from error
    except (msgspec.DecodeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise SpliceError(f"the body must be a JSON object in UTF-8: {said}") from error


def _name(quoted: bytes) -> str:
    if b"\\" not in quoted:
        return quoted[1:-1].decode()
    name: str = msgspec.json.decode(quoted)
    return name
