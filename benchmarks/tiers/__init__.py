"""How fast each tier moves values, against what its medium or client reaches without kvkeep.

One part per tier: a module beside this one with a function ``figures`` that can be called without
arguments and yields a ``Figure`` at a time. Each part runs in a process of its own; one that breaks
leaves the others alone.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import emit

FOLDER = Path(__file__).parent


def find_parts(folder: Path = FOLDER) -> list[str]:
    """Return the names of all parts, in order of name, importing none of them."""
    return [path.stem for path in sorted(folder.glob("*.py")) if _has_figures(path)]


def _has_figures(path: Path) -> bool:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:
        return True  # so that running it says what is wrong
    return any(isinstance(node, ast.FunctionDef) and node.name == "figures" for node in tree.body)


def run_parts(names: Sequence[str]) -> list[str]:
    """Run each part in a process of its own; return what broke, with its exit code."""
    broken = []
    for name in names:
        print(f"## {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.tiers", "--here", name]
        status = subprocess.run(command, cwd=FOLDER.parents[1], check=False).returncode
        if status != 0:
            broken.append(f"{name} (exit code {status})")
    return broken


def print_figures(name: str) -> None:
    """Take the figures of one part in this process."""
    for figure in importlib.import_module(f"benchmarks.tiers.{name}").figures():
        emit(figure)
