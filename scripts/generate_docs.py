"""Writes what docs/ says about messages and states from the code that defines them.

    python scripts/generate_docs.py          bring every generated part up to date
    python scripts/generate_docs.py --check  change nothing; exit code 1 if something is not

A generated part stands between two marks, the first of which names the function that returns it.
"""

import argparse
import ast
import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import msgspec

from kvkeep.core import blocks, breaker
from kvkeep.protocol import frames, session, versions
from kvkeep.protocol import messages as m
from kvkeep.router.handoff import machine as handoff
from kvkeep.router.handoff.machine import HandOffState

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(r"(<!-- generated: ([\w.]+):(\w+) -->\n)(.*?)(<!-- end generated -->)", re.S)


# ---- tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _one_line(text: str) -> str:
    """A docstring in the cell of a table."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def _field_docs(kind: type) -> dict[str, str]:
    """The strings below the fields of a class."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, doc in zip(body.body, [*body.body[1:], None], strict=True):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        ):
            docs[field.target.id] = inspect.cleandoc(str(doc.value.value))
    return docs


def _number(value: float) -> str:
    """A limit as a power of two where it is one."""
    for offset, suffix in ((0, ""), (1, " - 1")):
        number = int(value) + offset
        if value == int(value) and number >= 1 << 10 and number & (number - 1) == 0:
            return f"2^{number.bit_length() - 1}{suffix}"
    return f"{value:g}"


def _kind(kind: msgspec.inspect.Type) -> str:
    """A field's type and limits, for people."""
    match kind:
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"integer, {_number(low or 0)} to {_number(high or 0)}"
        case msgspec.inspect.FloatType(ge=low, le=high):
            return f"float, {low:g} to {high:g}"
        case msgspec.inspect.BytesType(min_length=low, max_length=high):
            return f"{low} bytes" if low else f"bytes, at most {_number(high or 0)}"
        case msgspec.inspect.StrType(max_length=high):
            return f"text, at most {high} characters" if high else "text"
        case msgspec.inspect.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.NoneType():
            return "nil"
        case msgspec.inspect.ListType(item_type=item, max_length=high):
            return f"array of {_kind(item)}; at most {_number(high or 0)}"
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(_kind(each) for each in types)
        case msgspec.inspect.StructType(cls=cls):
            return f"array [{cls.__name__}](#{cls.__name__.lower()})"
    raise NotImplementedError(f"no words for {kind}")


def _default(field: msgspec.inspect.Field) -> str:
    if field.default is msgspec.NODEFAULT:
        return ""
    return f" Left out: {'nil' if field.default is None else field.default}."


def _describe(kind: type) -> str:
    """A heading, the docstring and a table of the fields."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    docs = _field_docs(kind)
    first = 0 if info.tag is None else 1
    rows = [] if info.tag is None else [["0", "tag", f"`{info.tag}`", ""]]
    rows += [
        [str(at), f"`{field.name}`", _kind(field.type),
         (_one_line(docs.get(field.name, "")) + _default(field)).strip()]
        for at, field in enumerate(info.fields, first)
    ]  # fmt: skip
    doc = inspect.cleandoc(kind.__doc__ or "").replace("``", "`")
    return f"### {kind.__name__}\n\n{doc}\n\n{_table(['#', 'field', 'type', 'meaning'], rows)}"


def _list(kinds: Sequence[type]) -> str:
    rows = []
    for kind in kinds:
        info = msgspec.inspect.type_info(kind)
        assert isinstance(info, msgspec.inspect.StructType)
        summary = _one_line(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0])
        rows.append([str(info.tag), f"[{kind.__name__}](#{kind.__name__.lower()})", summary])
    return _table(["tag", "message", "what it says"], rows)


def message_list() -> str:
    """Every message with its tag, grouped by receiver."""
    return (
        f"To the daemon:\n\n{_list(get_args(m.ToDaemon))}\n\n"
        f"To the client:\n\n{_list(get_args(m.ToClient))}"
    )


def messages_to_daemon() -> str:
    """The fields of every message a client may send."""
    kinds = (*get_args(m.ToDaemon), m.Layout, m.IdentityPart)
    return "\n\n".join(_describe(kind) for kind in kinds)


def messages_to_client() -> str:
    """The fields of every message the daemon may send."""
    return "\n\n".join(_describe(kind) for kind in get_args(m.ToClient))


def limits() -> str:
    """What the sizes of the protocol are bounded by."""
    rows = [
        ["frame", f"{_number(frames.FRAME_BYTES_MAX)} bytes", "a longer one ends the session"],
        ["header of a frame", f"{frames.HEADER_BYTES} bytes", "length of what follows"],
        ["blocks per message", _number(m.HASHES_MAX), "block hashes of 32 bytes each"],
        ["text", f"{m.TEXT_MAX} characters", "but for Status and Told, which fill a frame at most"],
    ]
    return _table(["what", "limit", "note"], rows)


def version_list() -> str:
    """Versions of the wire format."""
    rows = [
        [str(version), change, "yes" if version in versions.SUPPORTED else "no"]
        for version, change in sorted(versions.CHANGES.items())
    ]
    return _table(["version", "what it changed", "understood"], rows)


# ---- states


def _words(step: Any) -> str:
    return str(step.value) if isinstance(step, Enum) else str(step.__name__)


def _states(transitions: Mapping[Any, Mapping[Any, Enum]]) -> str:
    """A diagram and the same as a table."""
    arrows = [
        (state, ", ".join(_words(step) for step, after in row.items() if after is target), target)
        for state, row in transitions.items()
        for target in dict.fromkeys(row.values())
    ]
    first = next(iter(transitions))
    diagram = [
        "```mermaid",
        "stateDiagram-v2",
        f"    [*] --> {first.value}",
        *(f"    {state.value} --> {target.value}: {steps}" for state, steps, target in arrows),
        "```",
    ]
    rows = [
        [state.value, _words(step), after.value]
        for state, row in transitions.items()
        for step, after in row.items()
    ]
    return "\n".join(diagram) + "\n\n" + _table(["in state", "what happens", "then"], rows)


def slot_states() -> str:
    """Where a slot of the pool can stand."""
    return _states(blocks.TRANSITIONS)


def breaker_states() -> str:
    """Whether a tier is asked."""
    return _states(breaker.TRANSITIONS)


def session_states() -> str:
    """Where a connection can stand, by the messages a client sends."""
    return _states(session.TRANSITIONS)


def handoff_states() -> str:
    """How far a request can be that is handed off."""
    moves = {
        state: [target for target in HandOffState if target in handoff.TRANSITIONS[state]]
        for state in HandOffState
    }
    arrows = [
        f"    {state.value} --> {target.value}" for state, row in moves.items() for target in row
    ]
    diagram = ["```mermaid", "stateDiagram-v2", "    [*] --> planned", *arrows, "```"]
    rows = [
        [state.value, ", ".join(each.value for each in row) or "-"] for state, row in moves.items()
    ]
    return "\n".join(diagram) + "\n\n" + _table(["in state", "then"], rows)


# ---- documents


def refreshed(text: str) -> str:
    """A document with every generated part made anew."""

    def remade(part: re.Match[str]) -> str:
        begin, module, function, _, end = part.groups()
        return f"{begin}{getattr(importlib.import_module(module), function)()}\n{end}"

    return PART.sub(remade, text)


def main() -> int:
    """Bring the documents up to date, or say which are not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if stale")
    is_check = parser.parse_args().check
    sys.path.insert(0, str(ROOT))  # the marks name this file as a module of the project's folder
    stale = []
    for path in sorted(ROOT.glob("docs/**/*.md")):
        old = path.read_text()
        new = refreshed(old)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not is_check:
                path.write_text(new)
    for path in stale:
        print(f"{path}: {'stale' if is_check else 'made anew'}")
    return 1 if stale and is_check else 0


if __name__ == "__main__":
    sys.exit(main())
