"""A pickle read as data: nothing in it is imported, called or built.

The opcodes are walked by a small machine that knows those which torch writes. A name stays a name,
and a call stays a `Call`: name, arguments and what was put into it. Whoever asked looks at
those and decides; a pickle with any other name or opcode is refused before that.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from kvkeep.model.errors import CorruptDataError, InputError

PICKLE_BYTES_MAX = 1 << 20
"""Of what describes the tensors; their bytes lie elsewhere. 512 layers take 400 kB."""


@dataclass(frozen=True)
class Name:
    """A class or function, by ``module.name``; only ever a text."""

    text: str


@dataclass(frozen=True)
class Stored:
    """What torch keeps outside the pickle: a tuple that names it."""

    told: Any


@dataclass(eq=False)
class Call:
    """What would be called, with what; it never is."""

    name: str
    args: Any
    items: dict[Any, Any] = field(default_factory=dict)
    """What would be set in it by key, as in a dictionary."""
    state: Any = None
    """What it would be given as its state."""


class _Mark:
    """Where a run of values begins on the stack."""


_PUSHED = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
     "BINUNICODE8", "UNICODE")
)  # fmt: skip
_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PASSED = frozenset(("PROTO", "FRAME", "STOP"))


def read_inert(data: bytes, names: Collection[str], source: str) -> Any:
    """Read a pickle.

    Args:
        data: All of it.
        names: Classes and functions that may stand in it, as ``module.name``.
        source: Where it comes from, for the sentence.

    Returns:
        Lists, dictionaries, tuples, texts and numbers, `Call`, `Name` and `Stored`. It may hold
        itself: walk no deeper than you know.

    Raises:
        InputError: It names something else, or would do something that data need not.
        CorruptDataError: It is no whole pickle.
    """
    if len(data) > PICKLE_BYTES_MAX:
        raise InputError(
            f"{source} describes its tensors in {len(data)} bytes, and {PICKLE_BYTES_MAX} are read"
        )
    machine = _Machine(names, source)
    try:
        for opcode, arg, _ in pickletools.genops(data):
            machine.step(opcode.name, arg)
        return machine.result()
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CorruptDataError(
            f"{source} is truncated or damaged where it describes its tensors: get it anew"
        ) from error


class _Machine:
    """The stack and the memo of a pickle, with values that do nothing.

    What does not fit raises IndexError, KeyError, TypeError or ValueError: the pickle is no whole
    one.
    """

    def __init__(self, names: Collection[str], source: str) -> None:
        self._names = names
        self._source = source
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """What is left at the end."""
        if len(self._stack) != 1:
            raise ValueError("not one value is left")
        return self._stack[0]

    def step(self, opcode: str, arg: Any) -> None:
        """Do what one opcode says."""
        stack = self._stack
        if opcode in _PUSHED:
            stack.append(arg)
        elif opcode in _FIXED:
            stack.append(_FIXED[opcode]())
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            if len(stack) < count:
                raise IndexError("too few values")
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == "TUPLE":
            values = self._since_mark()
            stack.append(tuple(values))
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if opcode == "MEMOIZE" else arg] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[arg])
        elif opcode not in _PASSED:
            self._step_object(opcode, arg)

    def _step_object(self, opcode: str, arg: Any) -> None:
        """Opcodes that fill, name or would make something."""
        stack = self._stack
        match opcode:
            case "APPEND":
                value = stack.pop()
                self._list().append(value)
            case "APPENDS":
                values = self._since_mark()
                self._list().extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set([key, value])
            case "SETITEMS":
                self._set(self._since_mark())
            case "GLOBAL":
                stack.append(self._named(arg.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._named(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                args, name = stack.pop(), stack.pop()
                if not isinstance(name, Name) or not isinstance(args, tuple):
                    raise TypeError("what would be called has no name")
                stack.append(Call(name.text, args))
            case "BUILD":
                state, target = stack.pop(), stack[-1]
                if not isinstance(target, Call):
                    raise TypeError("a state for what has none")
                target.state = state
            case "BINPERSID":
                stack.append(Stored(stack.pop()))
            case _:
                raise InputError(
                    f"{self._source} holds the pickle opcode {opcode}, which tensors don't need: "
                    "save plain lists of tensors with torch.save"
                )

    def _since_mark(self) -> list[Any]:
        """Take the values above the last mark, and the mark."""
        for idx in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[idx], _Mark):
                values = self._stack[idx + 1 :]
                del self._stack[idx:]
                return values
        raise IndexError("there is no mark")

    def _list(self) -> list[Any]:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError("values for what is no list")
        return target

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        items = target.items if isinstance(target, Call) else target
        if not isinstance(items, dict) or len(values) % 2:
            raise TypeError("items for what takes none")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise TypeError("a key that is no text")
            items[key] = value

    def _named(self, text: str) -> Name:
        if text not in self._names:
            raise InputError(
                f"{self._source} holds {text[:80]}, which could run code, and nothing in a file is "
                "run: save plain lists of tensors with torch.save"
            )
        return Name(text)
