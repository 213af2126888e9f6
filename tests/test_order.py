"""Nothing in core and protocol depends on the order of a set, which differs between two runs.

The check reads one file at a time. It knows as sets what is written as one, annotated as one, or
made from one by an operator, by name within a function and by attribute within a file.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "kvkeep"

SET_TYPE = re.compile(r"(set|frozenset|AbstractSet|MutableSet|Set)\b")
MAP_OF_SETS = re.compile(r"(default)?dict\[.*\b(set|frozenset)\b")
ORDER_BLIND = {"sorted", "min", "max", "sum", "any", "all", "len", "set", "frozenset"}
ORDER_KEEPING = {"list", "tuple", "iter", "enumerate", "next", "deque"}
SET_METHODS = {"union", "intersection", "difference", "symmetric_difference", "copy"}
LOOKUPS = {"get", "pop", "setdefault"}


class Sets:
    """What is known to be a set; an attribute's name begins with a dot."""

    def __init__(self, tree: ast.Module) -> None:
        self.sets: set[str] = set()
        self.maps: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                fields = [entry for entry in node.body if isinstance(entry, ast.AnnAssign)]
                for field in fields:
                    self._declare("." + _name(field.target), field.annotation)
        self.read(tree)
        # A plain name means something else in each function.
        self.sets = {name for name in self.sets if name.startswith(".")}
        self.maps = {name for name in self.maps if name.startswith(".")}

    def read(self, scope: ast.AST) -> None:
        """Learn what a scope declares and assigns."""
        for node in ast.walk(scope):
            if isinstance(node, ast.AnnAssign):
                self._declare(_name(node.target), node.annotation)
            elif isinstance(node, ast.arg) and node.annotation:
                self._declare(node.arg, node.annotation)
            elif isinstance(node, ast.Assign) and self.holds(node.value):
                self.sets.update(filter(None, map(_name, node.targets)))

    def _declare(self, name: str, annotation: ast.expr) -> None:
        text = ast.unparse(annotation).strip("'\"")
        if SET_TYPE.match(text):
            self.sets.add(name)
        if MAP_OF_SETS.match(text):
            self.maps.add(name)

    def holds(self, node: ast.expr) -> bool:
        """Say whether an expression is known to be a set."""
        match node:
            case ast.Set() | ast.SetComp():
                return True
            case ast.Call(func=ast.Name(id="set" | "frozenset")):
                return True
            case ast.Call(func=ast.Attribute(attr=method, value=owner)):
                in_map = method in LOOKUPS and _name(owner) in self.maps
                return in_map or (method in SET_METHODS and self.holds(owner))
            case ast.BinOp(left=left, right=right):
                return any(self.holds(side) or _is_keys(side) for side in (left, right))
            case ast.Subscript(value=owner):
                return _name(owner) in self.maps
            case ast.Name() | ast.Attribute():
                return _name(node) in self.sets
        return False


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return "." + node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _is_keys(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) == ".keys"


def _ordered_uses(scope: ast.AST) -> Iterator[ast.expr]:
    """Every expression whose order of iteration shows in a result."""
    blind: set[ast.AST] = set()
    for node in ast.walk(scope):  # a parent comes before its children
        match node:
            case ast.For(iter=iterated):
                yield iterated
            case ast.Call(func=ast.Name(id=name), args=args) if name in ORDER_BLIND:
                blind.update(args)
            case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in ORDER_KEEPING:
                if node not in blind:
                    yield first
            case ast.Call(func=ast.Attribute(attr="pop", value=owner), args=[]):
                yield owner
            case ast.ListComp() | ast.GeneratorExp() | ast.DictComp():
                if node not in blind:
                    yield from (generator.iter for generator in node.generators)
            case ast.Starred(value=value):
                yield value


def set_iterations(text: str) -> list[str]:
    """List what a file iterates in an order that is not its own."""
    tree = ast.parse(text)
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            sets = Sets(tree)
            sets.read(function)
            found += [
                f"line {used.lineno}: {ast.unparse(used)}"
                for used in _ordered_uses(function)
                if sets.holds(used)
            ]
    return found


FILES = sorted([*PACKAGE.glob("core/**/*.py"), *PACKAGE.glob("protocol/**/*.py")])


def test_there_are_files_to_check() -> None:
    """A moved folder would leave nothing to check, and every check would pass."""
    assert len(FILES) > 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_order_comes_from_a_set(path: Path) -> None:
    """A file of core or protocol sorts a set before it walks over it."""
    assert set_iterations(path.read_text()) == []


@pytest.mark.parametrize(
    "body",
    [
        "for x in {1, 2}: pass",
        "for x in set(given): pass",
        "held = set(given)\n    for x in held: pass",
        "for x in holders: pass",
        "for x in holders - {1}: pass",
        "for x in given.keys() & other.keys(): pass",
        "return [x for x in holders]",
        "return list(holders)",
        "return [*holders]",
        "return holders.pop()",
        "return next(iter(self.readers))",
        "for x in self.readers: pass",
        "for x in self.by_name['a']: pass",
        "for x in self.fields: pass",
    ],
)
def test_an_order_from_a_set_is_found(body: str) -> None:
    """Each way to walk over a set is a complaint."""
    text = f"""
class Table:
    fields: frozenset[int]
    def __init__(self):
        self.readers: set[int] = set()
        self.by_name: dict[str, set[int]] = {{}}
def ask(self, given, other, holders: set[int]):
    {body}
"""

    assert len(set_iterations(text)) == 1


@pytest.mark.parametrize(
    "body",
    [
        "for x in sorted(holders): pass",
        "return 3 in holders",
        "return max(x for x in holders)",
        "return {x + 1 for x in holders}",
        "return len(list(given))",
        "return given.pop()",
        "for x in given: pass",
    ],
)
def test_an_order_of_its_own_is_let_through(body: str) -> None:
    """A sorted set, a question to a set, and a list are no complaint."""
    assert set_iterations(f"def ask(given: list[int], holders: set[int]):\n    {body}\n") == []
