"""The rules about the tree that no other tool checks; CONTRIBUTING.md says why they stand.

A rule is a function from a file to complaints. Each is run over the tree, and once over a snippet
that breaks it, so that a rule which can no longer fail is noticed. An exception is one line in
``EXCEPTIONS``, with its reason.
"""

import ast
import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
FOLDER_FILES_MAX = 12
MAKEFILE_LINES_MAX = 60

VAGUE_FILES = {"utils", "util", "common", "helpers", "helper", "manager", "manager2", "misc"}
VAGUE_PREFIXES = ("process_", "handle_", "do_", "manage_")
VAGUE_ENDINGS = ("Manager", "Helper", "Util", "Utils")
UNITLESS = {"timeout", "deadline", "delay", "interval", "duration", "age", "ttl"}

EXCEPTIONS = {
    # (path or folder, complaint about): reason
    ("src/kvkeep/stack/", "_process_record"): "the record of a process: a noun",
    ("src/kvkeep/connector/plugin.py", "handle_preemptions"): "a hook that vLLM has named",
    ("src/kvkeep/adapters/lmcache_plugin.py", "contains"): "a method that LMCache has named",
    ("src/kvkeep/adapters/lmcache_plugin.py", "backend"): "an argument that LMCache has named",
    ("tests/unit/connector/test_signatures.py", "no module"): "tests what vLLM declares",
    ("tests/unit/connector/test_vllm_names.py", "no module"): "tests what vLLM calls things",
}

OTHER_CONFIG_FILES = {
    *("setup.py", "setup.cfg", "tox.ini", "noxfile.py", "requirements.txt", "uv.toml"),
    *("pytest.ini", ".pytest.ini", "pytest.toml", ".coveragerc", "mypy.ini", ".mypy.ini"),
    *(".flake8", "ruff.toml", ".ruff.toml", ".importlinter", ".pre-commit-config.yaml"),
}

# Parts of a word stand in brackets so that this file does not match itself.
FORBIDDEN_TEXT = {
    r"(?<![\w.:/-])/(?:wor[k]|roo[t]|hom[e]|User[s]|op[t])(?![\w-])": "a path of one machine",
    r"py[p]i\.org|python[h]osted|npm[j]s\.|de[b]\.debian|crate[s]\.io": "a package registry's host",
    r"\b(?:TOD[O](?!\(#\d+\))|FIXM[E]|XX[X]\b)": "a note without an issue: TODO(#123) or none",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """One file, as the rules see it."""

    path: str
    """Relative to the root, with slashes."""
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; only asked of Python files."""
        return ast.parse(self.text)

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        """All nodes of some kinds."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


Rule = Callable[[Source], Iterator[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _tracked(*patterns: str) -> list[Path]:
    """Find the project's own files; what git ignores lies in hidden or generated places."""
    folders = ("src", "tests", "benchmarks", "docs", "scripts", ".ci")
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    for folder in folders:
        found += [path for pattern in patterns for path in (ROOT / folder).rglob(pattern)]
    return sorted(
        path
        for path in set(found)
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)
    )


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def _sources(*patterns: str) -> list[Source]:
    return [Source(_relative(path), path.read_text()) for path in _tracked(*patterns)]


def _functions(source: Source) -> Iterator[Function]:
    for node in source.nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, Function)
        yield node


# --- Sizes and names of files ---------------------------------------------------------------------


def file_length(source: Source) -> Iterator[str]:
    """A file is short enough to be one thing."""
    lines = source.text.count("\n")
    if lines > FILE_LINES_MAX:
        yield f"{source.path}: {lines} lines, at most {FILE_LINES_MAX}"


def function_length(source: Source) -> Iterator[str]:
    """A function is short enough to be seen whole."""
    for function in _functions(source):
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > FUNCTION_LINES_MAX:
            yield (
                f"{source.path}:{function.lineno}: {function.name} has {lines} lines, "
                f"at most {FUNCTION_LINES_MAX}"
            )


def folder_sizes(paths: list[str]) -> Iterator[str]:
    """A folder holds few enough files to be read as a list."""
    counts: dict[str, int] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name not in ("__init__.py", "py.typed") and not name.endswith(".so"):
            counts[folder] = counts.get(folder, 0) + 1
    for folder, count in sorted(counts.items()):
        if count > FOLDER_FILES_MAX and not folder.endswith(("/suites", "/cli")):
            yield f"{folder}: {count} files, at most {FOLDER_FILES_MAX}"


def file_name(source: Source) -> Iterator[str]:
    """A file or folder is named after the question it answers."""
    for part in Path(source.path).with_suffix("").parts:
        if part.removeprefix("test_") in VAGUE_FILES:
            yield f"{source.path}: {part} says nothing about what is inside"


def mirrored(source: Source) -> Iterator[str]:
    """A unit test lies like its module: tests/unit/core/test_blocks*.py for core/blocks.py."""
    path = Path(source.path)
    if not source.path.startswith("tests/unit/") or not path.name.startswith("test_"):
        return
    part = path.parent.relative_to("tests/unit")
    # The benchmarks lie beside src/, and what they reckon with is tested like the rest.
    package = ROOT / part if part.parts[:1] == ("benchmarks",) else ROOT / "src/kvkeep" / part
    subject = path.stem.removeprefix("test_")
    modules = {module.stem for module in package.rglob("*") if module.stem != "__init__"}
    if package.name != "kvkeep" and not package.is_dir():
        yield f"{source.path}: there is no src/kvkeep/{package.name} to test"
    elif not any(subject == name or subject.startswith(f"{name}_") for name in modules):
        yield f"{source.path}: the name begins with no module of {_relative(package)}"


# --- Words ----------------------------------------------------------------------------------------


def _refused_words(glossary: str) -> dict[str, str]:
    """Read the glossary's last column: every name in code type, and the term to use instead."""
    refused: dict[str, str] = {}
    for line in glossary.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| **") and len(cells) == 5:
            for word in re.findall(r"`([^`]+)`", cells[4]):
                refused[word] = cells[0].replace("*", "")
    return refused


REFUSED = _refused_words((ROOT / "docs" / "glossary.md").read_text())


def _names(source: Source) -> Iterator[tuple[int, str]]:
    """Every name a reader meets from outside: functions, classes, arguments, fields."""
    for node in ast.walk(source.tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.ClassDef(name=name, body=body):
                yield node.lineno, name
                for entry in body:
                    if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                        yield entry.lineno, entry.target.id


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def glossary_words(source: Source) -> Iterator[str]:
    """One word per thing: a name the glossary refuses is refused."""
    for line, name in _names(source):
        if name.startswith("__"):
            continue
        padded = f"_{_snake(name)}_"
        for word, term in REFUSED.items():
            if f"_{word}_" in padded or f"_{word}s_" in padded:
                yield f"{source.path}:{line}: {name}: not {word}, see '{term}' in docs/glossary.md"


def grammar_of_names(source: Source) -> Iterator[str]:
    """A name says what happens, what a thing is, and in which unit."""
    for line, name in _names(source):
        if name in UNITLESS:
            yield f"{source.path}:{line}: {name}: put the unit into the name"
        if name.lstrip("_").startswith(VAGUE_PREFIXES):
            yield f"{source.path}:{line}: {name}: says nothing about what happens"
        if name.endswith(VAGUE_ENDINGS):
            yield f"{source.path}:{line}: {name}: say what it is"


# --- Tests and text -------------------------------------------------------------------------------


def missing_docstrings(source: Source) -> Iterator[str]:
    """A test says in one sentence which behavior it shows."""
    for function in _functions(source):
        if function.name.startswith("test_") and not ast.get_docstring(function):
            yield f"{source.path}:{function.lineno}: {function.name} has no docstring"


def sleeping_test(source: Source) -> Iterator[str]:
    """A unit test waits for events: a sleep is slow where it works and wrong elsewhere."""
    if not source.path.startswith(("tests/unit/", "tests/contract/", "tests/property/")):
        return
    for call in source.nodes(ast.Call):
        assert isinstance(call, ast.Call)
        if ast.unparse(call.func).endswith("sleep") and ast.unparse(call) != "asyncio.sleep(0)":
            yield f"{source.path}:{call.lineno}: waits with {ast.unparse(call)}"


def forbidden_text(source: Source) -> Iterator[str]:
    """The tree names no path of one machine and no registry's host."""
    for number, line in enumerate(source.text.splitlines(), 1):
        for pattern, what in FORBIDDEN_TEXT.items():
            if re.search(pattern, line):
                yield f"{source.path}:{number}: {what}: {line.strip()[:80]}"


# --- Documents ------------------------------------------------------------------------------------

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
TEST_ID = re.compile(r"\b(tests/[\w/]+\.py)(?:::(\w+))?(?:::(\w+))?")
GENERATED = re.compile(r"<!-- generated: ([\w.]+):(\w+) -->\n(.*?)<!-- end generated -->", re.S)
MAKE_TARGET = re.compile(r"\bmake ([a-z]+)")


def _prose(text: str) -> str:
    """A document without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.S)


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _prose(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(source: Source) -> Iterator[str]:
    """A link between documents leads to a file, and to a heading in it."""
    for link in LINK.findall(_prose(source.text)):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / source.path).parent / name if name else ROOT / source.path
        if name and not target.exists():
            yield f"{source.path}: {link} leads nowhere"
        elif anchor and target.suffix == ".md":
            text = target.read_text() if name else source.text
            if anchor not in _anchors(text):
                yield f"{source.path}: {link}: no such heading"


def missing_tests(source: Source) -> Iterator[str]:
    """A test that a document names as its proof is there."""
    for path, *names in TEST_ID.findall(source.text):
        if not (ROOT / path).is_file():
            yield f"{source.path}: there is no {path}"
            continue
        for name in filter(None, names):
            if not re.search(rf"(def|class) {name}\b", (ROOT / path).read_text()):
                yield f"{source.path}: there is no {name} in {path}"


def missing_targets(source: Source) -> Iterator[str]:
    """A make target that a document or script names is there."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    in_code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", source.text, flags=re.S))
    for target in MAKE_TARGET.findall(in_code):
        if target not in targets:
            yield f"{source.path}: make {target}: the Makefile has no such target"


def stale_tables(source: Source) -> Iterator[str]:
    """What stands between generated-marks is what the named function returns now.

    The mark names ``module:function``; the function takes nothing and returns the text between.
    """
    for module, function, text in GENERATED.findall(source.text):
        if text.strip() != str(getattr(importlib.import_module(module), function)()).strip():
            yield f"{source.path}: paste anew what {module}.{function}() returns"


# --- The tree keeps the rules ---------------------------------------------------------------------

EVERYWHERE = (
    "*.py",
    "*.pyi",
    "*.c",
    "*.md",
    "*.sh",
    "*.toml",
    "*.yaml",
    "*.txt",
    "Makefile",
    "run",
)
RULES: list[tuple[Rule, tuple[str, ...], str]] = [
    (file_length, ("*.py",), ""),
    (function_length, ("*.py",), ""),
    (file_name, ("*.py",), ""),
    (mirrored, ("*.py",), "tests/"),
    (glossary_words, ("*.py",), "src/"),
    (grammar_of_names, ("*.py",), "src/"),
    (missing_docstrings, ("*.py",), "tests/"),
    (sleeping_test, ("*.py",), "tests/"),
    (forbidden_text, EVERYWHERE, ""),
    (broken_links, ("*.md",), ""),
    (missing_tests, ("*.md",), ""),
    (missing_targets, ("*.md",), ""),
    (stale_tables, ("*.md",), ""),
]


def _is_excepted(path: str, complaint: str) -> bool:
    return any(path.startswith(place) and word in complaint for place, word in EXCEPTIONS)


@pytest.mark.parametrize(
    ("rule", "patterns", "under"), RULES, ids=[rule[0].__name__ for rule in RULES]
)
def test_the_tree_keeps_the_rule(rule: Rule, patterns: tuple[str, ...], under: str) -> None:
    """No file of the project breaks the rule, but for the listed exceptions."""
    sources = [source for source in _sources(*patterns) if source.path.startswith(under)]
    complaints = [
        complaint
        for source in sources
        for complaint in rule(source)
        if not _is_excepted(source.path, complaint)
    ]

    assert sources
    assert not complaints, "\n".join(complaints)


def test_folders_are_short() -> None:
    """No folder of the source holds more files than a reader takes in at a glance."""
    paths = [source.path for source in _sources("*.py", "*.pyi", "*.c")]

    assert list(folder_sizes([path for path in paths if path.startswith("src/")])) == []


def test_the_makefile_is_short() -> None:
    """The Makefile fits on one screen; logic belongs into scripts/."""
    assert len((ROOT / "Makefile").read_text().splitlines()) <= MAKEFILE_LINES_MAX


def test_there_is_one_configuration_file() -> None:
    """pyproject.toml configures every tool; a second file some tools would not find."""
    assert OTHER_CONFIG_FILES & {path.name for path in ROOT.iterdir()} == set()


def test_every_exception_is_needed() -> None:
    """An exception whose file is gone, or complies by now, is taken out."""
    complaints = [
        (source.path, complaint)
        for rule, patterns, under in RULES
        for source in _sources(*patterns)
        if source.path.startswith(under)
        for complaint in rule(source)
    ]
    unused = [
        (place, word)
        for place, word in EXCEPTIONS
        if not any(path.startswith(place) and word in complaint for path, complaint in complaints)
    ]

    assert unused == []


# --- Each rule can fail ---------------------------------------------------------------------------

BROKEN: list[tuple[Rule, str, str]] = [
    (file_length, "src/a.py", "x = 1\n" * 501),
    (function_length, "src/a.py", "def f():\n" + "    x = 1\n" * 70),
    (file_name, "src/kvkeep/core/utils.py", ""),
    (file_name, "src/kvkeep/common/blocks.py", ""),
    (mirrored, "tests/unit/core/test_nothing_there.py", ""),
    (mirrored, "tests/unit/nowhere/test_blocks.py", ""),
    (glossary_words, "src/a.py", "def f(block_size: int): ..."),
    (glossary_words, "src/a.py", "class PageTable: ..."),
    (glossary_words, "src/a.py", "def drop_cache_keys(): ..."),
    (glossary_words, "src/a.py", "class A:\n    ref_cnt: int"),
    (grammar_of_names, "src/a.py", "def f(timeout: float): ..."),
    (grammar_of_names, "src/a.py", "def _handle_it(): ..."),
    (grammar_of_names, "src/a.py", "class BlockManager: ..."),
    (missing_docstrings, "tests/a.py", "def test_it():\n    assert f()"),
    (sleeping_test, "tests/unit/a.py", "time.sleep(1)"),
    (forbidden_text, "docs/a.md", "see /ro" + "ot/notes"),
    (forbidden_text, "docs/a.md", "cd '/wo" + "rk/tree'"),
    (forbidden_text, "docs/a.md", "https://py" + "pi.org/x"),
    (forbidden_text, "src/a.py", "x = 1  # TO" + "DO: later"),
    (broken_links, "docs/a.md", "[there](nothing.md)"),
    (broken_links, "docs/a.md", "[there](glossary.md#no-such-heading)"),
    (missing_tests, "docs/a.md", "proved by tests/fault/test_no" + "where.py"),
    (missing_tests, "docs/a.md", "proved by tests/test_tidy.py::test_no" + "thing"),
    (missing_targets, "docs/a.md", "run `make coffee`"),
    (stale_tables, "docs/a.md", "<!-- generated: os:getcwd -->\nold\n<!-- end generated -->"),
]


@pytest.mark.parametrize(
    ("rule", "path", "text"), BROKEN, ids=lambda part: getattr(part, "__name__", "")
)
def test_the_rule_can_fail(rule: Rule, path: str, text: str) -> None:
    """Text that breaks the rule once draws one complaint, which names the file."""
    complaints = list(rule(Source(path, text)))

    assert len(complaints) == 1
    assert complaints[0].startswith(path)


def test_a_full_folder_is_found() -> None:
    """The thirteenth file is one too many; commands and suites may be many."""
    names = [f"{number}.py" for number in range(13)]

    assert len(list(folder_sizes([f"src/kvkeep/core/{name}" for name in names]))) == 1
    assert list(folder_sizes([f"src/kvkeep/cli/{name}" for name in names])) == []


def test_the_glossary_is_read() -> None:
    """The refused words come out of the table's last column, in code type only."""
    row = "| **block id** | which | int | `theirs` | `page_id`, slot |"

    assert _refused_words(row) == {"page_id": "block id"}
    assert len(REFUSED) > 30
