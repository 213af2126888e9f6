"""What is wrong with settings, in words that name the field and the mend.

msgspec checks them; how it words what does not fit is about types of Python and paths of its own.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

SHOWN_CHARS_MAX: Final = 200
"""Of a value that is refused."""
_PLACE: Final = re.compile(r"^(.*?) - at (`key` in )?`\$\.?(.*)`$", re.DOTALL)
_STEP: Final = re.compile(r"[^.\[\]]+|\[[^\]]*\]")
_NAMES: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}
"""What msgspec calls each type, and what a user does."""
_LIMITS: Final = {"<=": "of at most", ">=": "of at least", "<": "below", ">": "above"}


def wording_of(complaint: str, values: object, kind: type[msgspec.Struct]) -> str:
    """Say what is wrong, and what to write.

    Args:
        complaint: The text of msgspec's ``ValidationError``.
        values: What did not fit ``kind``.
        kind: The settings; tells what may be chosen.

    Returns:
        One sentence without its full stop, with the field as it stands in the file.
    """
    found = _PLACE.match(complaint)
    said, is_name, path = (complaint, None, "") if found is None else found.groups()
    steps = _STEP.findall(path)
    if missing := re.fullmatch(r"Object missing required field `(.*)`", said):
        return f"{_joined(path, missing[1])} is missing: write it"
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", said):
        known = ", ".join(sorted(_fields_at(kind, steps, values)))
        return f"{_joined(path, unknown[1])!r} is not a setting here: choose from {known}"
    mend = mend_of(said, kind, path)
    if mend is None:
        return complaint if found is None else f"{path} can't be: {said[0].lower()}{said[1:]}"
    if is_name:
        return f"a name in {path} can't be: {mend}"
    shown = _at(values, steps)
    if shown is _NOTHING or isinstance(shown, dict | list):
        return f"{path} can't be so: {mend}"
    return f"{path} = {short(repr(shown))} can't be: {mend}"


def short(text: str) -> str:
    """A text that fits a sentence."""
    return text if len(text) <= SHOWN_CHARS_MAX else f"{text[:SHOWN_CHARS_MAX]}..."


def mend_of(said: str, kind: type[msgspec.Struct], path: str) -> str | None:
    """What to write instead; None where the sentence is the project's own.

    Args:
        said: What stands before the place in msgspec's complaint.
        kind: The settings.
        path: The place in them, such as ``tiers[0].kind``.
    """
    if re.match(r"Invalid (enum )?value ", said):
        choices = [str(choice) for choice in _choices_at(kind, _STEP.findall(path))]
        return f"choose from {', '.join(choices)}" if choices else "it is not known"
    expected = re.fullmatch(r"Expected `([^`]*)`(?:, got `[^`]*`|(.*))", said, re.DOTALL)
    if expected is None:
        return None
    names = [_NAMES.get(name, name) for name in expected[1].split(" | ")]
    return f"write {' or '.join(names)}{_limit(expected[2] or '')}"


def _limit(said: str) -> str:
    if bound := re.fullmatch(r" (<=|>=|<|>) (.*)", said):
        number = bound[2].removesuffix(".0")
        return f" {_LIMITS[bound[1]]} {number}"
    if length := re.fullmatch(r" of length (<=|>=) (.*)", said):
        return f" of length {length[2]} or {'more' if length[1] == '>=' else 'less'}"
    if said.startswith(" matching regex"):
        return f" that matches {said.removeprefix(' matching regex').strip()}"
    return said


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


_NOTHING: Final = object()


def _at(values: object, steps: list[str]) -> object:
    """The value at a path; ``_NOTHING`` where msgspec does not say which it is."""
    for step in steps:
        name = step.strip("[]")
        if isinstance(values, dict) and name in values:
            values = values[name]
        elif isinstance(values, list) and name.isdigit() and int(name) < len(values):
            values = values[int(name)]
        else:
            return _NOTHING
    return values if steps else _NOTHING


# ---- what the types allow


def _types_at(kind: type[msgspec.Struct], steps: list[str]) -> Iterator[Any]:
    """Every type that a value at this path may have."""
    types = list(_unfolded(msgspec.inspect.type_info(kind)))
    for step in steps:
        below: list[Any] = []
        for found in types:
            if isinstance(found, msgspec.inspect.StructType):
                below += [f.type for f in found.fields if f.encode_name == step]
            elif isinstance(found, msgspec.inspect.ListType):
                below.append(found.item_type)
            elif isinstance(found, msgspec.inspect.DictType):
                below.append(found.value_type)
        types = [one for found in below for one in _unfolded(found)]
    return iter(types)


def _unfolded(found: Any) -> Iterator[Any]:
    if isinstance(found, msgspec.inspect.UnionType):
        for one in found.types:
            yield from _unfolded(one)
    elif isinstance(found, msgspec.inspect.Metadata):
        yield from _unfolded(found.type)
    else:
        yield found


def _choices_at(kind: type[msgspec.Struct], steps: list[str]) -> list[object]:
    for found in _types_at(kind, steps):
        if isinstance(found, msgspec.inspect.LiteralType):
            return list(found.values)
    return [
        found.tag
        for found in _types_at(kind, steps[:-1])
        if isinstance(found, msgspec.inspect.StructType) and steps and found.tag_field == steps[-1]
    ]


def _fields_at(kind: type[msgspec.Struct], steps: list[str], values: object) -> list[str]:
    there = _at(values, steps) if steps else values
    structs = [
        found
        for found in _types_at(kind, steps)
        if isinstance(found, msgspec.inspect.StructType)
        and (
            found.tag_field is None
            or (isinstance(there, dict) and there.get(found.tag_field, found.tag) == found.tag)
        )
    ]
    return [field.encode_name for found in structs for field in found.fields]
