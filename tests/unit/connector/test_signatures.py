"""The connector fits the plug-in interface of every vLLM release it is meant for.

vLLM is never imported: ``signatures/`` describes each release, and the connector is read as
source. So a renamed argument of a release nobody has installed here is still found.
"""

import ast
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONNECTOR = ROOT / "src" / "kvkeep" / "connector"
SIGNATURES = Path(__file__).resolve().parent / "signatures"
FACTS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(SIGNATURES.glob("*.json"))
}
RELEASES: dict[str, dict[str, Any]] = {v: facts["classes"] for v, facts in FACTS.items()}
BASES = ("KVConnectorBase_V1", "SupportsHMA")
# Class variables that vLLM documents as the way to set a value.
INHERITED_ON_PURPOSE = {"_cache_hit_source"}


# --- signatures ------------------------------------------------------------------------------


@dataclass
class Parameters:
    """A parameter list, receiver left out."""

    positional: list[str] = field(default_factory=list)
    optional: set[str] = field(default_factory=set)
    keyword_only: set[str] = field(default_factory=set)
    takes_args: bool = False
    takes_kwargs: bool = False


def parse(spec: ast.arguments, *, receiver: bool = True) -> Parameters:
    """Sort the parameters of a definition; ``receiver`` says that the first is self or cls."""
    names = [arg.arg for arg in [*spec.posonlyargs, *spec.args]]
    optional = set(names[len(names) - len(spec.defaults) :]) if spec.defaults else set()
    pairs = zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    optional |= {arg.arg for arg, default in pairs if default is not None}
    return Parameters(
        positional=names[1:] if receiver else names,
        optional=optional,
        keyword_only={arg.arg for arg in spec.kwonlyargs},
        takes_args=spec.vararg is not None,
        takes_kwargs=spec.kwarg is not None,
    )


def definition(text: str) -> ast.FunctionDef:
    """The function whose parameter list is ``text``."""
    node = ast.parse(f"def f({text}): ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def misfits(ours: Parameters, theirs: Parameters) -> list[str]:
    """Calls that ``theirs`` allows and ``ours`` refuses, one sentence each."""
    found = []
    for position, name in enumerate(theirs.positional):
        if position >= len(ours.positional):
            if not (ours.takes_args and (ours.takes_kwargs or name in ours.keyword_only)):
                found.append(f"lacks argument {position + 1}, {name}")
        elif ours.positional[position] != name:
            found.append(f"names argument {position + 1} {ours.positional[position]}, not {name}")
        elif name in theirs.optional and name not in ours.optional:
            found.append(f"demands {name}, which a caller may leave out")
    for name in theirs.keyword_only - ours.keyword_only - set(ours.positional):
        if not ours.takes_kwargs:
            found.append(f"lacks keyword {name}")
    given = set(theirs.positional) | theirs.keyword_only
    extra = [*ours.positional[len(theirs.positional) :], *sorted(ours.keyword_only)]
    found += [f"demands {n}" for n in extra if n not in given and n not in ours.optional]
    if theirs.takes_args and not ours.takes_args:
        found.append("lacks *args")
    if theirs.takes_kwargs and not ours.takes_kwargs:
        found.append("lacks **kwargs")
    return found


def plugin() -> ast.ClassDef:
    """The connector class, as source."""
    tree = ast.parse((CONNECTOR / "plugin.py").read_text())
    return next(
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "KvkeepConnector"
    )


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """Methods of a class by name."""
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def variables(node: ast.ClassDef) -> set[str]:
    """Names that the class body assigns."""
    found = set()
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            found.add(ast.unparse(item.target))
        elif isinstance(item, ast.Assign):
            found |= {ast.unparse(target) for target in item.targets}
    return found


def decorators(function: ast.FunctionDef) -> set[str]:
    """Last part of each decorator's name."""
    return {ast.unparse(d).split("(")[0].split(".")[-1] for d in function.decorator_list}


def interface(version: str) -> dict[str, tuple[str, list[str]]]:
    """Methods a connector may override in a release: name -> parameters, kinds."""
    return {
        name: (text, RELEASES[version][base].get("kinds", {}).get(name, []))
        for base in BASES
        for name, text in RELEASES[version][base]["methods"].items()
    }


def targets_of(statement: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    """What an assignment assigns to."""
    return statement.targets if isinstance(statement, ast.Assign) else [statement.target]


@pytest.mark.parametrize("version", RELEASES)
def test_overrides_accept_every_call_of_the_release(version: str) -> None:
    """Each overridden method takes what vLLM passes, by position or by name."""
    theirs, found = interface(version), []
    for name, function in methods(plugin()).items():
        if name not in theirs or name == "__init__":
            continue
        text, kinds = theirs[name]
        found += [
            f"{name} {m}" for m in misfits(parse(function.args), parse(definition(text).args))
        ]
        ours = decorators(function) & {"classmethod", "staticmethod", "property"}
        expected = set(kinds) & {"classmethod", "staticmethod", "property"}
        if ours != expected:
            found.append(f"{name} is {sorted(ours)}, the release has {sorted(expected)}")

    assert found == []


@pytest.mark.parametrize("version", RELEASES)
def test_every_abstract_method_is_implemented(version: str) -> None:
    """The class can be instantiated on the release."""
    abstract = {name for name, (_, kinds) in interface(version).items() if "abstract" in kinds}

    assert set() == abstract - set(methods(plugin()))


@pytest.mark.parametrize("version", RELEASES)
def test_constructor_takes_what_the_factory_passes(version: str) -> None:
    """The factory's call fits, and the third argument has the name that it looks for."""
    own = parse(methods(plugin())["__init__"].args)

    for text in FACTS[version]["connector_calls"]:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert len(call.args) == len([n for n in own.positional if n not in own.optional])
        assert own.positional[2] == "kv_cache_config"
        assert [k.arg for k in call.keywords if k.arg not in own.positional] == []


def test_public_methods_are_hooks_of_some_release() -> None:
    """A public method whose name no release knows is a hook that vLLM never calls."""
    known = {name for version in RELEASES for name in interface(version)}
    known |= {a for r in RELEASES.values() for b in BASES for a in r[b].get("attributes", {})}
    node = plugin()
    public = {n for n in [*methods(node), *variables(node)] if not n.startswith("_")}

    assert set() == public - known


def test_private_names_leave_those_of_the_base_class_alone() -> None:
    """A private name of vLLM's base class is not overwritten by chance."""
    taken = {
        name
        for release in RELEASES.values()
        for base in BASES
        for part in ("methods", "attributes")
        for name in release[base].get(part, {})
        if name.startswith("_") and not name.startswith("__")
    }
    node = plugin()
    assigned = {
        target.attr
        for statement in ast.walk(node)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in targets_of(statement)
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    }

    used = assigned | set(methods(node)) | variables(node)
    assert set() == (used & taken) - INHERITED_ON_PURPOSE


# --- the checks themselves -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("self, a, b=0", "self, a, b=0", []),
        ("self, a, *args, **kwargs", "self, a, b, *, c=1", []),
        ("self, a, b=0, *, c=1", "self, a", []),
        ("self, x", "self, a", ["names argument 1 x, not a"]),
        ("self, a", "self, a, b", ["lacks argument 2, b"]),
        ("self, a, b", "self, a", ["demands b"]),
        ("self, a", "self, a=1", ["demands a, which a caller may leave out"]),
        ("self", "self, *, c=1", ["lacks keyword c"]),
        ("self", "self, **kwargs", ["lacks **kwargs"]),
    ],
)
def test_misfits_names_each_refused_call(ours: str, theirs: str, expected: list[str]) -> None:
    """A parameter list that refuses a call of the other is reported, a wider one is not."""
    assert expected == misfits(parse(definition(ours).args), parse(definition(theirs).args))


def extractor() -> ModuleType:
    """The script that writes ``signatures/``."""
    spec = importlib.util.spec_from_file_location("extract", SIGNATURES / "extract.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_signatures_of_the_installed_release_are_up_to_date() -> None:
    """What is written down for the vLLM installed here is what its sources say."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed: pip install 'kvkeep[vllm]'")
    script = extractor()
    facts = script.describe_folder(Path(spec.submodule_search_locations[0]))

    written = SIGNATURES / f"{facts['vllm']}.json"
    assert written.exists(), f"run {script.__file__} for vLLM {facts['vllm']}"
    assert written.read_text() == script.as_text(facts)
