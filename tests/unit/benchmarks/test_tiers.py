"""The tiers' benchmark finds its parts, and a broken one does not stop the others."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PART = """
from benchmarks.figures import Figure
def figures(rounds=1):
    yield Figure("tiers.good.read", 2.0, "MB/s")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with a part that works, one that breaks, one that is half written, and no part."""
    folder = tmp_path / "benchmarks" / "tiers"
    folder.mkdir(parents=True)
    for name in ("run.py", "figures.py", "tiers/__init__.py", "tiers/__main__.py"):
        shutil.copy(ROOT / "benchmarks" / name, folder.parent / name)
    (folder / "good.py").write_text(PART)
    (folder / "broken.py").write_text("def figures():\n    raise OSError('no server')\n")
    (folder / "halfway.py").write_text("def figures(:\n")
    (folder / "shapes.py").write_text("SIDES = 4\n")
    return folder


def _run(folder: Path, module: str, *args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", module, *args],
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_all_parts_are_tried(folder: Path) -> None:
    """Figures of those that work are printed; the others are named, with exit code 1."""
    finished = _run(folder, "benchmarks.tiers")

    assert finished.returncode == 1
    assert [line.split(",")[0] for line in finished.stdout.splitlines()] == [
        '{"figure": "tiers.good.read"'
    ]
    assert "could not be measured: broken (exit code 1), halfway (exit code 1)" in finished.stderr


def test_make_bench_runs_the_named_parts(folder: Path) -> None:
    """A folder with a main is a benchmark like a module; names go to it."""
    finished = _run(folder, "benchmarks.run", "tiers", "good")

    assert finished.returncode == 0, finished.stderr
    assert '"figure": "tiers.good.read"' in finished.stdout


def test_an_unknown_tier_is_one_sentence(folder: Path) -> None:
    """A name that is no part is answered with those there are, and exit code 2."""
    finished = _run(folder, "benchmarks.tiers", "shapes")

    assert finished.returncode == 2
    assert finished.stderr.splitlines() == [
        "there is no tier 'shapes'; take some of: broken, good, halfway"
    ]
