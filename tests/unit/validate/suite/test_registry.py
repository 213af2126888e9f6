"""The table of suites: every documented name leads to one, and each says what it needs."""

from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.validate import pytest_suites
from kvkeep.validate.suite.base import GROUPS, NotApplicable
from kvkeep.validate.suite.registry import find, find_all, run_suite, suites, table
from tests.unit.validate import reference_tables as tables
from tests.unit.validate.conftest import MakeContext

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.mark.parametrize(("name", "suite"), tables.NAMES.items())
def test_every_documented_name_is_a_suite(name: str, suite: str) -> None:
    """A file or test of the documents can be asked for by its own name."""
    assert [found.name for found in find(name)] == [suite]


def test_every_suite_explains_itself() -> None:
    """Each has sentences, known groups, and needs with a sentence each."""
    for suite in suites():
        assert suite.title.endswith(".")
        assert suite.proves.endswith(".")
        assert set(suite.groups) <= GROUPS.keys() - {"all"}
        assert all(need.name for need in suite.needs)
        assert f"**{suite.name}**" in table()


def test_groups_are_made_of_suites() -> None:
    """No group is empty, and ``all`` is all; several names give each suite once."""
    assert find("all") == list(suites())
    for name in GROUPS:
        assert find(name)
    assert [s.name for s in find_all(["stress", "generation", "test_stress.py"])] == [
        "generation",
        "stress",
    ]


def test_an_unknown_name_is_refused() -> None:
    """The sentence names what there is."""
    with pytest.raises(InputError, match="long-doc-qa"):
        find("no-such-suite")


def test_every_suite_runs_under_pytest() -> None:
    """The folder for a CI has a file for each suite, under a documented name, with its markers."""
    folder = Path(pytest_suites.__file__).parent
    texts = {path.name: path.read_text() for path in folder.glob("test_*.py")}
    asked = "".join(texts.values())

    assert [suite.name for suite in suites() if f'check_suite("{suite.name}")' not in asked] == []
    assert all(f"pytest.mark.{marker}" in asked for marker in tables.MARKERS)
    documented = {name for name in tables.NAMES if name.startswith("test_") and "." in name}
    assert documented - texts.keys() <= {"test_determinism.py"}


async def test_what_is_missing_is_said(make_context: MakeContext) -> None:
    """A suite that the subject can't run says what would supply it, and asks nothing."""
    fake = FakeEngine()
    (suite,) = find("routing")

    (report,) = await run_suite(suite, await make_context(fake))

    assert isinstance(report, NotApplicable)
    assert "--router-admin" in report.reason
    assert (report.outcome, report.passed) == ("not-applicable", False)
    assert report.to_dict()["reason"] == report.reason
