"""``kvkeep check determinism`` on real stacks: passes with kvkeep, proves nothing without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def check_determinism(folder: Path, *subject: str) -> tuple[int, list[str]]:
    """Exit code and the outcome of each run.

    Args:
        folder: For what the command writes.
        subject: Options that say what is checked.
    """
    report = folder / "report.json"
    command = [sys.executable, "-m", "kvkeep", "check", "determinism", *subject]
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
    found = check_determinism(tmp_path, "--stack", str(EXAMPLES / "one-engine.yaml"))

    assert found == (0, ["passed"])


@pytest.mark.nightly  # another start; of an engine that runs anyway it is asked in every run
@pytest.mark.kvbm
@pytest.mark.timeout(600, func_only=True)
def test_an_engine_without_kvkeep_is_not_exercised(tmp_path: Path) -> None:
    """Without kvkeep nothing is served after the reset: the check must not pass."""
    found = check_determinism(tmp_path, "--stack", str(EXAMPLES / "no-cache.yaml"))

    assert found == (1, ["not-exercised"])
