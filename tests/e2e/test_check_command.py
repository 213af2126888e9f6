"""``kvkeep check determinism`` on real stacks: passes with kvkeep, proves nothing without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def _check(stack: Path, folder: Path) -> tuple[int, list[str]]:
    """Exit code and the outcome of each run."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "kvkeep", "check", "determinism", "--stack", str(stack)]
    command += ["--max-iterations", "6", "--max-tokens", "16", "--json", str(report)]
    # A user's own state folder is not the tests' to write to.
    environment = {"XDG_STATE_HOME": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stderr[-2000:] + done.stdout[-2000:]
    runs = json.loads(report.read_text())["runs"]
    return done.returncode, [run["outcome"] for run in runs]


@pytest.mark.kvbm
@pytest.mark.timeout(600, func_only=True)
def test_kvkeep_passes_the_determinism_check(tmp_path: Path) -> None:
    """With kvkeep the replay is served from outside the engine and every answer is right."""
    assert _check(EXAMPLES / "one-engine.yaml", tmp_path) == (0, ["passed"])


@pytest.mark.kvbm
@pytest.mark.timeout(600, func_only=True)
def test_an_engine_without_kvkeep_is_not_exercised(tmp_path: Path) -> None:
    """Without kvkeep nothing is served after the reset: the check must not pass."""
    assert _check(EXAMPLES / "no-cache.yaml", tmp_path) == (1, ["not-exercised"])
