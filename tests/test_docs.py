"""What docs/ says about messages and states is what the code says, and code in it runs."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from kvkeep.core import blocks
from kvkeep.protocol import messages as m
from kvkeep.protocol import session
from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore
from kvkeep.validate.suite import registry
from tests.unit.validate import conftest as simulated

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "generate_docs.py"
DOCUMENTS = {"docs/protocol.md": 5, "docs/states.md": 2}
"""Documents and how many generated parts each has at least."""
SUITE_PAGE = ROOT / "docs" / "adding-a-suite.md"
FILE = re.compile(r"```python\n# (\S+)\.py\n(.*?)```", re.S)
"""Code in a document that is a whole file, under its name."""

connect, make_context, no_pauses = simulated.connect, simulated.make_context, simulated.no_pauses


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The script as a module, importable under the name that the marks use."""
    spec = importlib.util.spec_from_file_location("scripts.generate_docs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", DOCUMENTS)
def test_generated_parts_are_up_to_date(
    name: str, generator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made anew, a document is what it was."""
    monkeypatch.syspath_prepend(str(ROOT))
    text = (ROOT / name).read_text()

    assert len(generator.PART.findall(text)) >= DOCUMENTS[name]
    assert generator.refreshed(text) == text


def test_a_stale_part_is_found(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that says something else does not pass as up to date."""
    monkeypatch.syspath_prepend(str(ROOT))
    text = (ROOT / "docs/states.md").read_text().replace("| writing | write failed | free |", "")

    assert "| writing | write failed | free |" in generator.refreshed(text)


def test_the_script_finds_nothing_to_do() -> None:
    """Run as a person runs it, the script says that all is up to date."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )

    assert (done.stdout, done.returncode) == ("", 0)


def test_every_message_and_field_is_described() -> None:
    """No message is missing from the document, and no field of one."""
    text = (ROOT / "docs/protocol.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", text, flags=re.S | re.M))
    kinds = [*get_args(m.ToDaemon), *get_args(m.ToClient)]

    assert {kind.__name__ for kind in kinds} <= set(sections)
    for kind in kinds:
        for field in kind.__struct_fields__:
            assert f"| `{field}` |" in sections[kind.__name__]


def test_every_move_is_described() -> None:
    """Each row of the tables of states is a row of the document."""
    text = (ROOT / "docs/states.md").read_text()
    for state, row in blocks.TRANSITIONS.items():
        for move, after in row.items():
            assert f"| {state.value} | {move.value} | {after.value} |" in text
    for before, messages in session.TRANSITIONS.items():
        for kind, then in messages.items():
            assert f"| {before.value} | {kind.__name__} | {then.value} |" in text


# ---- the suite of docs/adding-a-suite.md


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The files of the page, by their last names; the suite among them is in the registry."""
    found = {}
    for path, code in FILE.findall(SUITE_PAGE.read_text()):
        name = path.replace("/", ".")
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, f"{SUITE_PAGE}, {name}", "exec"), vars(module))
        found[name.rpartition(".")[2]] = module
    monkeypatch.setattr(registry, "MODULES", (*registry.MODULES, "shared_beginning"))
    registry.suites.cache_clear()
    yield found
    registry.suites.cache_clear()


@pytest.mark.usefixtures("no_pauses")
async def test_the_documented_suite_runs(
    documented: dict[str, ModuleType], make_context: simulated.MakeContext
) -> None:
    """Asked for by its name, as a person would after writing the files."""
    (suite,) = registry.find("shared-beginning")
    context = await make_context(FakeEngine(store=FakeStore()))

    (report,) = await registry.run_suite(suite, context)

    assert report.passed
    assert suite in registry.find("quick")
    assert f"**{suite.name}** | quick, all |" in registry.table()


@pytest.mark.usefixtures("no_pauses")
async def test_its_documented_tests_pass(
    documented: dict[str, ModuleType], make_context: simulated.MakeContext
) -> None:
    """They are the page's own: where it passes, proves nothing, and fails."""
    tests = vars(documented["test_shared_beginning"])
    names = [name for name in tests if name.startswith("test_")]

    assert len(names) == 3
    for name in names:
        await tests[name](make_context)


def test_every_decision_has_a_number_of_its_own() -> None:
    """It stands in the file's name and in its title."""
    files = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [file.name.split("-")[0] for file in files]

    assert [file.name for file in files if numbers.count(file.name.split("-")[0]) > 1] == []
    titles = [file.read_text().splitlines()[0] for file in files]
    assert [title.split()[1] for title in titles] == numbers
