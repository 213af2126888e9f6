"""Writes down the part of one vLLM release that the connector touches, as JSON beside this file.

Reads Python sources only, from a wheel or from an installed ``vllm`` folder: vLLM is never
imported, so one machine can describe every release. To add a release:

    pip download --no-deps --only-binary=:all: -d WHEELS vllm==X.Y.Z
    python tests/unit/connector/signatures/extract.py WHEELS/vllm-X.Y.Z-*.whl
"""

import argparse
import ast
import json
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

CONNECTORS = "distributed/kv_transfer/kv_connector"
CLASSES = {
    f"{CONNECTORS}/v1/base.py": (
        "KVConnectorBase_V1",
        "SupportsHMA",
        "KVConnectorTransferResults",
        "KVConnectorRole",
        "KVConnectorMetadata",
        "KVConnectorWorkerMetadata",
        "KVConnectorHandshakeMetadata",
    ),
    f"{CONNECTORS}/factory.py": ("KVConnectorFactory",),
    "config/cache.py": ("CacheConfig",),
    "config/kv_transfer.py": ("KVTransferConfig",),
    "config/lora.py": ("LoRAConfig",),
    "config/model.py": ("ModelConfig",),
    "config/parallel.py": ("ParallelConfig",),
    "config/scheduler.py": ("SchedulerConfig",),
    "config/speculative.py": ("SpeculativeConfig",),
    "config/vllm.py": ("VllmConfig",),
    "lora/request.py": ("LoRARequest",),
    "multimodal/inputs.py": ("MultiModalFeatureSpec", "PlaceholderRange"),
    "v1/core/block_pool.py": ("BlockPool",),
    "v1/core/kv_cache_manager.py": ("KVCacheBlocks", "KVCacheManager"),
    "v1/core/kv_cache_utils.py": ("KVCacheBlock",),
    "v1/core/sched/output.py": (
        "SchedulerOutput",
        "NewRequestData",
        "CachedRequestData",
        "KVConnectorBlockState",
    ),
    "v1/kv_cache_interface.py": (
        "KVCacheConfig",
        "KVCacheGroupSpec",
        "KVCacheSpec",
        "AttentionSpec",
        "FullAttentionSpec",
        "MLAAttentionSpec",
        "SlidingWindowSpec",
        "UniformTypeKVCacheSpecs",
    ),
    "v1/outputs.py": ("KVConnectorOutput",),
    "v1/request.py": ("Request", "RequestStatus"),
}
"""Source file -> classes to describe. A class that a release lacks is left out of its JSON."""

MODULES = (
    *CLASSES,
    "distributed/kv_events.py",
    "distributed/parallel_state.py",
    "forward_context.py",
    "logger.py",
    "v1/attention/backend.py",
    "v1/attention/backends/utils.py",
    "v1/metrics/cache_hit_source.py",
)
"""Source files whose public names are listed. A file that a release lacks is left out."""

SUBCLASSED = ("KVConnectorBase_V1", "SupportsHMA")
"""Classes whose private names matter too, because the connector inherits them."""


@dataclass
class ClassFacts:
    """What one class offers to a reader of its attributes and to a subclass."""

    bases: list[str] = field(default_factory=list)
    """Names of the base classes, without module and type arguments."""
    methods: dict[str, str] = field(default_factory=dict)
    """Method name -> parameter list as source, without annotations."""
    kinds: dict[str, list[str]] = field(default_factory=dict)
    """Method name -> what it is beside a plain method: abstract, classmethod, property, ..."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Field, class variable, ``self`` attribute or property -> annotation as source, or ''."""

    def as_json(self) -> dict[str, Any]:
        """The same, empty parts left out."""
        return {name: value for name, value in vars(self).items() if value}


def parameters(function: ast.FunctionDef) -> str:
    """The parameter list of ``function`` as source, without annotations."""
    spec = function.args
    for arg in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]:
        if arg is not None:
            arg.annotation = None
    return ast.unparse(spec)


def source(annotation: ast.expr | None) -> str:
    """An annotation as source, quotes of forward references removed."""
    return "" if annotation is None else ast.unparse(annotation).strip("'\"")


def kinds_of(function: ast.FunctionDef) -> list[str]:
    """What the decorators make of a method, in a fixed order."""
    names = {ast.unparse(d).split("(")[0].split(".")[-1] for d in function.decorator_list}
    table = {
        "abstractmethod": "abstract",
        "classmethod": "classmethod",
        "staticmethod": "staticmethod",
        "property": "property",
        "cached_property": "property",
    }
    return sorted({table[name] for name in names if name in table})


def own_attributes(function: ast.FunctionDef) -> dict[str, str]:
    """Attributes that ``function`` sets on ``self``, with the annotation where one is known."""
    spec = function.args
    typed = {arg.arg: source(arg.annotation) for arg in [*spec.args, *spec.kwonlyargs]}
    found: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
            annotation = ""
        elif isinstance(node, ast.AnnAssign):
            targets, value = [node.target], node.value or node.target
            annotation = source(node.annotation)
        else:
            continue
        if not annotation and isinstance(value, ast.Name):
            annotation = typed.get(value.id, "")
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                found[target.attr] = found.get(target.attr) or annotation
    return found


def without_private(facts: ClassFacts) -> ClassFacts:
    """Drop names that nobody outside the class may read; a subclass would inherit them."""
    for table in (facts.methods, facts.kinds, facts.attributes):
        for name in [n for n in table if n.startswith("_") and n != "__init__"]:
            del table[name]
    return facts


def describe_class(node: ast.ClassDef) -> ClassFacts:
    """Collect the facts of one class, private names included."""
    facts = ClassFacts(bases=[ast.unparse(b).split("[")[0].split(".")[-1] for b in node.bases])
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            facts.attributes[item.target.id] = source(item.annotation)
        elif isinstance(item, ast.Assign):
            facts.attributes.update({t.id: "" for t in item.targets if isinstance(t, ast.Name)})
        elif isinstance(item, ast.FunctionDef):
            returns, kinds = source(item.returns), kinds_of(item)
            for name, annotation in own_attributes(item).items():
                facts.attributes[name] = facts.attributes.get(name) or annotation
            if "property" in kinds:
                facts.attributes[item.name] = returns
            facts.methods[item.name] = parameters(item)
            if kinds:
                facts.kinds[item.name] = kinds
    return facts


def connector_calls(tree: ast.Module) -> list[str]:
    """The calls by which the factory constructs a connector, as source."""
    return sorted(
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "connector_cls"
    )


def public_names(tree: ast.Module) -> list[str]:
    """Classes, functions and variables that a module defines for others, sorted."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return sorted(name for name in found if not name.startswith("_"))


def modules_of(read: Callable[[str], str]) -> dict[str, list[str]]:
    """Public names of every module in ``MODULES`` that the release has."""
    found = {}
    for path in MODULES:
        try:
            text = read(path)
        except (KeyError, FileNotFoundError):
            continue
        name = path.removesuffix(".py").replace("/", ".")
        found[f"vllm.{name}"] = public_names(ast.parse(text))
    return found


def describe(read: Callable[[str], str], version: str) -> dict[str, Any]:
    """Describe one release.

    Args:
        read: Path inside the ``vllm`` package -> its source.
        version: The release's version, as vLLM names it.

    Raises:
        KeyError: A file of ``CLASSES`` is missing: vLLM moved it, and the table must follow.
    """
    classes: dict[str, dict[str, Any]] = {}
    for path, names in CLASSES.items():
        tree = ast.parse(read(path))
        found = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        for name in [n for n in names if n in found]:
            facts = describe_class(found[name])
            kept = facts if name in SUBCLASSED else without_private(facts)
            classes[name] = kept.as_json()
    factory = ast.parse(read(f"{CONNECTORS}/factory.py"))
    return {
        "vllm": version,
        "connector_calls": connector_calls(factory),
        "modules": modules_of(read),
        "classes": classes,
    }


def describe_wheel(path: Path) -> dict[str, Any]:
    """Describe the release in a vLLM wheel."""
    with zipfile.ZipFile(path) as wheel:
        return describe(lambda name: wheel.read(f"vllm/{name}").decode(), path.name.split("-")[1])


def describe_folder(path: Path) -> dict[str, Any]:
    """Describe the release installed at ``path``, the folder of the ``vllm`` package."""
    stamp = re.search(
        r"^__version__ = version = '([\d.]+)", (path / "_version.py").read_text(), re.M
    )
    if stamp is None:
        raise ValueError(f"{path}/_version.py names no version; give a wheel instead.")
    return describe(lambda name: (path / name).read_text(), stamp.group(1).rstrip("."))


def as_text(facts: dict[str, Any]) -> str:
    """One line per class and sorted names, so that two releases can be compared with diff."""
    tables = []
    for table in ("modules", "classes"):
        rows = [
            f"  {json.dumps(name)}: {json.dumps(value, sort_keys=True)}"
            for name, value in sorted(facts[table].items())
        ]
        tables.append(f'"{table}": {{\n' + ",\n".join(rows) + "\n}")
    head = {name: facts[name] for name in ("vllm", "connector_calls")}
    return json.dumps(head)[:-1] + ", " + ", ".join(tables) + "}\n"


def main() -> int:
    """Write one JSON file per release named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="+", type=Path, help="vLLM wheel, or the vllm folder")
    for path in parser.parse_args().source:
        if not path.exists():
            print(f"{path} does not exist; give a vLLM wheel or folder.", file=sys.stderr)
            return 2
        facts = describe_folder(path) if path.is_dir() else describe_wheel(path)
        target = HERE / f"{facts['vllm']}.json"
        target.write_text(as_text(facts))
        print(f"{target.name}: {len(facts['classes'])} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
