"""Runs the benchmarks: `make bench`, or `make bench ONLY=name` for one.

A benchmark is a module beside this one with a function ``main``, or a folder whose ``__main__`` has
one; run as a program it prints one JSON line per figure (``figures.emit``). Each runs in a process
of its own, so that none measures another's memory and threads. The exit status says whether the
figures could be taken, never whether targets were met.
"""

import argparse
import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
OK, BROKEN, BAD_INPUT = 0, 1, 2


def find_benchmarks() -> list[str]:
    """Return the names of all benchmarks, in order of name, importing none of them."""
    paths = [path for path in FOLDER.glob("*.py") if path != Path(__file__)]
    # A folder with a main is one benchmark, of several parts.
    folders = [path for path in FOLDER.glob("*/__main__.py") if _has_main(path)]
    names = [path.stem for path in paths if _has_main(path)]
    return sorted(names + [path.parent.name for path in folders])


def _has_main(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def run_benchmark(name: str, argv: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Run one benchmark and pass on what it prints, line by line.

    Args:
        name: One of ``find_benchmarks()``.
        argv: The benchmark's own arguments.

    Returns:
        Its figures, and its exit status.
    """
    figures = []
    command = [sys.executable, "-m", f"benchmarks.{name}", *argv]
    with subprocess.Popen(
        command, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            if figure := _as_figure(line):
                figures.append(figure)
    return figures, child.returncode


def _as_figure(line: str) -> dict[str, Any] | None:
    try:
        figure = json.loads(line)
    except ValueError:
        return None
    return figure if isinstance(figure, dict) and "figure" in figure else None


def summarize(figures: Sequence[dict[str, Any]]) -> str:
    """Return a table of figures for people; the JSON lines are for machines."""
    marks = {True: "met", False: "NOT MET", None: ""}
    rows = [
        (
            str(figure["figure"]),
            f"{figure.get('value')} {figure.get('unit', '')}",
            "" if figure.get("ratio") is None else f"{figure['ratio']}x",
            str(figure.get("target") or ""),
            marks.get(figure.get("met"), ""),
        )
        for figure in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)] if rows else []
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all benchmarks, or one; further arguments go to that one.

    Returns:
        0 when every benchmark printed figures, met or not; 1 when one broke; 2 for a name that is
        no benchmark.
    """
    parser = argparse.ArgumentParser(prog="make bench", add_help=False)
    parser.add_argument("only", nargs="?")
    parsed, rest = parser.parse_known_args(argv)
    names = find_benchmarks()
    if parsed.only is not None and parsed.only not in names:
        print(
            f"there is no benchmark {parsed.only!r}; take one of: {', '.join(names)}",
            file=sys.stderr,
        )
        return BAD_INPUT
    figures: list[dict[str, Any]] = []
    broken = []
    for name in [parsed.only] if parsed.only else names:
        print(f"# {name}", file=sys.stderr, flush=True)
        found, status = run_benchmark(name, rest)
        figures += found
        if status != 0 or not found:
            broken.append(f"{name} (exit code {status}, {len(found)} figures)")
    print(summarize(figures), file=sys.stderr)
    if broken:
        print(f"could not be measured: {', '.join(broken)}", file=sys.stderr)
        return BROKEN
    return OK


if __name__ == "__main__":
    sys.exit(main())
