"""A matrix of fleets' outcomes, out of runs in whatever order."""

from typing import Any

from kvkeep.validate.report.matrix import columns_of, matrix_of


def run(prefill: str, decode: str, outcome: str) -> dict[str, Any]:
    return {"outcome": outcome, "fleet": {"prefill": prefill, "decode": decode}}


def test_rows_and_columns_go_by_size() -> None:
    """Whatever ran first; runs without a fleet are not in it, and a row may have gaps."""
    runs = [
        run("TP 10", "TP 2", "passed"),
        {"outcome": "failed"},
        run("TP 2", "TP 4, blocks of 64", "refused"),
        run("TP 2", "TP 2", "failed"),
    ]

    matrix = matrix_of(runs)

    assert list(matrix) == ["TP 2", "TP 10"]
    assert list(matrix["TP 2"].items()) == [("TP 2", "failed"), ("TP 4, blocks of 64", "refused")]
    assert matrix["TP 10"] == {"TP 2": "passed"}
    assert columns_of(matrix) == ["TP 2", "TP 4, blocks of 64"]


def test_without_fleets_there_is_none() -> None:
    """A report of other suites has an empty one."""
    assert matrix_of([{"outcome": "passed"}]) == {}
