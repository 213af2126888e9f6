"""docs/cartridges-cases.md: its sums are right, and the tests it names exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cartridges-cases.md").read_text()
NUM_CASES = 178
NUM_FILES = 10
TOTAL = re.compile(r"^\| \[`(test_cartridge_\w+\.py)`\]\S+ \| (\d+) \| (\d+) \|$", re.M)
SECTION = re.compile(r"^## (test_cartridge_\w+\.py)\n(.*?)(?=^## |\Z)", re.M | re.S)
ROW = re.compile(r"^\| .+ \| (\d+) \| (.+) \|$", re.M)
NAMED = re.compile(r"`(tests/[\w/]+\.py)((?:::\w+)*)`")


def test_the_totals_add_up() -> None:
    """Of each file, and of all."""
    rows = TOTAL.findall(PAGE)
    cases, here = sum(int(row[1]) for row in rows), sum(int(row[2]) for row in rows)

    assert (len(rows), cases) == (NUM_FILES, NUM_CASES)
    assert f"| **together** | {cases} | {here} |" in PAGE


@pytest.mark.parametrize(("name", "cases", "here"), TOTAL.findall(PAGE))
def test_a_section_adds_up(name: str, cases: str, here: str) -> None:
    """Its rows have all of the file's cases, and those that are missing say so."""
    text = dict(SECTION.findall(PAGE))[name]
    rows = [(int(count), shown) for count, shown in ROW.findall(text)]
    if not rows:
        assert f"{here} of {cases}:" in text
        return

    assert sum(count for count, _ in rows) == int(cases)
    assert sum(count for count, shown in rows if not shown.startswith("missing")) == int(here)


@pytest.mark.parametrize(("path", "names"), sorted(set(NAMED.findall(PAGE))))
def test_a_test_that_is_named_exists(path: str, names: str) -> None:
    """File, class and function."""
    tree: ast.Module | ast.ClassDef = ast.parse((ROOT / path).read_text())
    for name in names.split("::")[1:]:
        found = [node for node in tree.body if getattr(node, "name", "") == name]
        assert found, f"{path} has no {name}"
        if isinstance(found[0], ast.ClassDef):
            tree = found[0]
