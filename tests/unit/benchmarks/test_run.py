"""`make bench` runs what is asked for and says plainly what it could not measure."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FIGURE = '{"figure": "%s", "value": 2.0, "unit": "ms", "ratio": 0.5, "target": "%s", "met": %s}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with two benchmarks: one misses its target, one breaks."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    shutil.copy(ROOT / "benchmarks" / "run.py", folder)
    (folder / "shapes.py").write_text("SIDES = 4\n")
    missed = FIGURE % ("a.slow", "value <= 1", "false")
    (folder / "slow.py").write_text(f"def main():\n    print('{missed}')\nmain()\n")
    (folder / "torn.py").write_text("def main():\n    raise OSError('no disk')\nmain()\n")
    return folder


def _run(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *args],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_a_missed_target_is_no_failure(folder: Path) -> None:
    """The JSON line is all that stands on standard output; the table says NOT MET; exit code 0."""
    finished = _run(folder, "slow")

    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == FIGURE % ("a.slow", "value <= 1", "false")
    assert "NOT MET" in finished.stderr


def test_one_broken_benchmark_does_not_stop_the_others(folder: Path) -> None:
    """All are tried; the one that broke is named, and the exit code is 1."""
    finished = _run(folder)

    assert finished.returncode == 1
    assert "a.slow" in finished.stdout
    assert "could not be measured: torn (exit code 1, 0 figures)" in finished.stderr


def test_an_unknown_name_is_one_sentence(folder: Path) -> None:
    """A name that is no benchmark is answered with those there are, and exit code 2."""
    finished = _run(folder, "shapes")

    assert finished.returncode == 2
    assert finished.stderr.splitlines() == [
        "there is no benchmark 'shapes'; take one of: slow, torn"
    ]
