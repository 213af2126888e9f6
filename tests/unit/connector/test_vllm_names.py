"""The connector uses only names of vLLM that every release it is meant for has.

vLLM is never imported: ``signatures/`` describes each release, and the connector is read as
source. Best effort: a value is followed through annotations, fields and loops, and a read that
cannot be attributed to a vLLM class is not judged.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CONNECTOR = Path(__file__).resolve().parents[3] / "src" / "kvkeep" / "connector"
SIGNATURES = Path(__file__).resolve().parent / "signatures"
FACTS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(SIGNATURES.glob("*.json"))
}
RELEASES: dict[str, dict[str, Any]] = {v: facts["classes"] for v, facts in FACTS.items()}

# What a parameter without a usable annotation holds, by the name vLLM gives it.
NAMED = {
    "request": "Request",
    "scheduler_output": "SchedulerOutput",
    "vllm_config": "VllmConfig",
    "kv_cache_config": "KVCacheConfig",
    "kv_transfer_config": "KVTransferConfig",
    "connector_output": "KVConnectorOutput",
    "gpu_block_pool": "BlockPool",
    "block_pool": "BlockPool",
    "lora_request": "LoRARequest",
    "blocks": "KVCacheBlocks",
}


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """Methods of a class by name."""
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def targets_of(statement: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    """What an assignment assigns to."""
    return statement.targets if isinstance(statement, ast.Assign) else [statement.target]


# --- imports ---------------------------------------------------------------------------------


def imports_in(text: str) -> set[tuple[str, str]]:
    """Every (vLLM module, name) that a module of the connector imports."""
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
        if node.module is not None
    }


def absent_imports(imports: set[tuple[str, str]]) -> dict[str, list[str]]:
    """Imports that fail on some release: 'module.name' -> those releases.

    A module that ``signatures/`` does not list counts as absent everywhere: add it to
    ``MODULES`` in ``signatures/extract.py``, or better, do without it.
    """
    found = {}
    for module, name in sorted(imports):
        versions = [
            version
            for version, facts in FACTS.items()
            if name not in facts["modules"].get(module, [])
            and f"{module}.{name}" not in facts["modules"]
        ]
        if versions:
            found[f"{module}.{name}"] = versions
    return found


def test_names_imported_from_vllm_exist_in_every_release() -> None:
    """Outside compat.py, nothing is imported that one of the releases lacks."""
    sources = [p for p in sorted(CONNECTOR.rglob("*.py")) if p.name != "compat.py"]
    found = {p.name: absent_imports(imports_in(p.read_text())) for p in sources}

    assert {name: absent for name, absent in found.items() if absent} == {}


# --- attributes ------------------------------------------------------------------------------

KNOWN = {name for release in RELEASES.values() for name in release}
MANY = re.compile(r"^(?:list|tuple|set|Sequence|Iterable|dict)\[(?:str, )?(\w+)[\],]")


@dataclass(frozen=True)
class Typed:
    """A value known to be of a vLLM class, or a container of such values."""

    name: str
    many: bool = False


def typed(annotation: str) -> Typed | None:
    """What an annotation says about a vLLM class."""
    plain = re.sub(r"['\"]|\s*\|\s*None|\b\w+\.(?=\w)", "", annotation).strip()
    if plain in KNOWN:
        return Typed(plain)
    inner = MANY.match(plain)
    return Typed(inner.group(1), many=True) if inner and inner.group(1) in KNOWN else None


def ancestry(name: str, release: dict[str, Any]) -> Iterator[str]:
    """The class and its bases, then the classes derived from it: a spec is often narrowed."""
    pending = [name]
    while pending:
        current = pending.pop()
        yield current
        pending += [b for b in release.get(current, {}).get("bases", []) if b in release]
    for other, facts in release.items():
        if name in facts.get("bases", []):
            yield from ancestry_down(other, release)


def ancestry_down(name: str, release: dict[str, Any]) -> Iterator[str]:
    """The class and everything derived from it."""
    yield name
    for other, facts in release.items():
        if name in facts.get("bases", []):
            yield from ancestry_down(other, release)


def annotation_in(release: dict[str, Any], owner: str, attribute: str) -> str | None:
    """The attribute's annotation in a release ('' if it has none); None if it does not exist."""
    for name in ancestry(owner, release):
        facts = release.get(name, {})
        if attribute in facts.get("attributes", {}):
            return str(facts["attributes"][attribute])
        if attribute in facts.get("methods", {}):
            return ""
    return None


def pairs_of(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """Single assignments that ``target = value`` stands for."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=False))
    return [(target, value)]


def is_plausible(owner: str, name: str, function: ast.FunctionDef) -> bool:
    """Whether a parameter may be what its name suggests: something of it is read, or nothing."""
    read = {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name
    }
    known = {a for a in read for r in RELEASES.values() if annotation_in(r, owner, a) is not None}
    return bool(known) or not read


def narrowed(function: ast.FunctionDef) -> set[str]:
    """Names that the function tests for a class of its own; what they hold is not judged."""
    return {
        ast.unparse(node.args[0])
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
    }


class Reader:
    """Follows values of vLLM classes through one function and notes what is read off them."""

    def __init__(self, fields: dict[str, Typed]) -> None:
        self.names: dict[str, Typed] = {}
        self.fields = fields
        self.reads: set[tuple[str, str]] = set()

    def type_of(self, node: ast.expr) -> Typed | None:
        """The vLLM class of an expression, if it can be told."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Subscript):
            inner = self.type_of(node.value)
            return Typed(inner.name) if inner and inner.many else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            inner = self.type_of(node.func.value)
            return inner if inner and inner.many and node.func.attr == "values" else None
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            if owner is None:
                own = self.fields.get(node.attr) if ast.unparse(node.value) == "self" else None
                plain = NAMED.get(node.attr.removeprefix("_"))
                return own or (Typed(plain) if plain else None)
            if owner.many:
                return None
            found = [annotation_in(r, owner.name, node.attr) for r in RELEASES.values()]
            return next((t for t in (typed(a) for a in found if a) if t), None)
        return None

    def bind(self, target: ast.expr, value: Typed | None) -> None:
        """Remember what a name holds."""
        if isinstance(target, ast.Name) and value is not None:
            self.names[target.id] = value

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        """Remember what an assignment makes names hold."""
        for left, right in pairs_of(target, value):
            self.bind(left, self.type_of(right))

    def read(self, function: ast.FunctionDef) -> None:
        """Note every attribute that ``function`` reads off a value of a vLLM class."""
        spec = function.args
        for arg in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]:
            annotation = ast.unparse(arg.annotation) if arg.annotation else "Any"
            guess = NAMED.get(arg.arg) if "Any" in annotation else None
            if guess is not None and not is_plausible(guess, arg.arg, function):
                guess = None
            self.bind(ast.Name(arg.arg), typed(annotation) or (Typed(guess) if guess else None))
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in targets_of(node):
                    self.assign(target, node.value)
            elif isinstance(node, ast.For | ast.comprehension):
                inner = self.type_of(node.iter)
                self.bind(node.target, Typed(inner.name) if inner and inner.many else None)
        for name in narrowed(function):
            self.names.pop(name, None)
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = self.type_of(node.value)
                if owner is not None and not owner.many:
                    self.reads.add((owner.name, node.attr))


def fields_of(node: ast.ClassDef) -> dict[str, Typed]:
    """Attributes of our class that hold values of vLLM classes, from its constructor."""
    constructor = methods(node).get("__init__")
    if constructor is None:
        return {}
    reader = Reader({})
    reader.read(constructor)
    return {
        target.attr: held
        for statement in ast.walk(constructor)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None
        for whole in targets_of(statement)
        for target, value in pairs_of(whole, statement.value)
        if isinstance(target, ast.Attribute) and (held := reader.type_of(value))
    }


def reads_in(text: str) -> set[tuple[str, str]]:
    """Every (vLLM class, attribute) that a module of the connector reads."""
    found: set[tuple[str, str]] = set()
    tree = ast.parse(text)
    owned = {
        id(f): fields_of(c)
        for c in ast.walk(tree)
        if isinstance(c, ast.ClassDef)
        for f in methods(c).values()
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            reader = Reader(owned.get(id(node), {}))
            reader.read(node)
            found |= reader.reads
    return found


def missing(reads: set[tuple[str, str]]) -> dict[str, list[str]]:
    """Reads that some release cannot answer: 'Class.attribute' -> releases without it."""
    found = {}
    for owner, attribute in sorted(reads):
        absent = [
            version
            for version, release in RELEASES.items()
            if owner not in release or annotation_in(release, owner, attribute) is None
        ]
        if absent:
            found[f"{owner}.{attribute}"] = absent
    return found


def test_attributes_read_off_vllm_exist_in_every_release() -> None:
    """Outside compat.py, nothing is read that one of the releases lacks."""
    sources = [p for p in sorted(CONNECTOR.rglob("*.py")) if p.name != "compat.py"]
    found = {p.name: missing(reads_in(p.read_text())) for p in sources}

    assert {name: absent for name, absent in found.items() if absent} == {}


def test_attributes_read_in_compat_exist_in_some_release() -> None:
    """Even compat.py reads nothing that no release has."""
    absent = missing(reads_in((CONNECTOR / "compat.py").read_text()))

    assert {name: gone for name, gone in absent.items() if set(gone) == set(RELEASES)} == {}


# --- the checks themselves -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("scheduler_output.has_sync_kv_loads", {"SchedulerOutput.has_sync_kv_loads": ["0.26.0"]}),
        ("scheduler_output.total_num_scheduled_tokens", {}),
        (
            "[new.replay_start for new in scheduler_output.scheduled_new_reqs]",
            {"NewRequestData.replay_start": ["0.26.0"]},
        ),
        ("state.request.session_id", {"Request.session_id": ["0.26.0"]}),
        (
            "self.config.cache_config.calculate_kv_scales",
            {"CacheConfig.calculate_kv_scales": ["0.32.0", "0.33.0"]},
        ),
    ],
)
def test_reads_are_followed_through_names_fields_and_loops(
    body: str, expected: dict[str, list[str]]
) -> None:
    """An attribute that one release lacks is found wherever its object came from."""
    source = (
        "class Side:\n"
        "    def __init__(self, vllm_config: 'VllmConfig') -> None:\n"
        "        self.config = vllm_config\n"
        "    def plan(self, scheduler_output: SchedulerOutput) -> None:\n"
        f"        {body}\n"
    )

    assert expected == missing(reads_in(source))


def test_an_import_that_one_release_lacks_is_named() -> None:
    """A class added in 0.32 cannot be imported on 0.26."""
    base = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    text = f"from {base} import KVConnectorTransferResults, KVConnectorRole"

    expected = {f"{base}.KVConnectorTransferResults": ["0.26.0"]}
    assert absent_imports(imports_in(text)) == expected
