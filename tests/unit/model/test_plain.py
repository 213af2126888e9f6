"""What settings may hold, and what is refused before anyone walks through it."""

from datetime import date
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.model.plain import DEPTH_MAX, NODES_MAX, TEXT_MAX, check_plain


def nested(levels: int) -> list[Any]:
    """Lists in lists."""
    values: list[Any] = []
    for _ in range(levels - 1):
        values = [values]
    return values


@pytest.mark.parametrize(
    "values",
    [None, {"a": 1.5, "b": [{"c": date(2026, 1, 1)}, b"x", True]}, nested(DEPTH_MAX), -(1 << 63)],
)
def test_what_settings_hold_is_let_through(values: object) -> None:
    """Texts, numbers, lists and mappings of a sensible size."""
    check_plain(values, "it")


def test_what_expands_is_refused_before_it_does() -> None:
    """A list that is named ten times in a list that is named ten times, and so on."""
    values: list[Any] = ["x"]
    for _ in range(30):
        values = [values] * 10

    with pytest.raises(InputError, match="it holds more than settings need"):
        check_plain(values, "it")


def test_what_holds_itself_is_refused() -> None:
    """A walk through it would never end."""
    values: dict[str, Any] = {}
    values["a"] = values

    with pytest.raises(InputError, match="nested too deep"):
        check_plain(values, "it")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (nested(DEPTH_MAX + 1), "nested too deep"),
        ([0] * NODES_MAX, "more than settings need"),
        ({"a": ["x" * (TEXT_MAX // 2)] * 3}, "more than settings need"),
        ({1 << 65: 0}, "more than 64 bits"),
    ],
    ids=["deep", "many", "long", "huge"],
)
def test_each_limit_is_one(values: object, complaint: str) -> None:
    """Just beyond it, one sentence."""
    with pytest.raises(InputError, match=complaint):
        check_plain(values, "it")
