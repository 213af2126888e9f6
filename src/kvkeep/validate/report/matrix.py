"""Outcomes of a suite that ran on several fleets, as a matrix. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Matrix = dict[str, dict[str, str]]
"""Outcome by prefill engines, then by decode engines."""


def matrix_of(runs: Iterable[Mapping[str, Any]]) -> Matrix:
    """The matrix of those runs that were on a fleet of their own."""
    found: Matrix = {}
    for run in runs:
        fleet = run.get("fleet")
        if fleet:
            found.setdefault(fleet["prefill"], {})[fleet["decode"]] = str(run["outcome"])
    return {name: dict(_in_order(found[name])) for name in sorted(found, key=_numbers_in)}


def _in_order(row: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(row.items(), key=lambda cell: _numbers_in(cell[0]))


def _numbers_in(label: str) -> list[int]:
    """What sizes are sorted by: whoever resumes a sweep has them in another order."""
    return [int(number) for number in re.findall(r"\d+", label)]


def columns_of(matrix: Mapping[str, Mapping[str, str]]) -> Sequence[str]:
    """Every kind of decode engines, the smallest first."""
    return sorted({name for row in matrix.values() for name in row}, key=_numbers_in)
