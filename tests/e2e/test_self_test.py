"""The self-test on a real engine and model: faults below are refused, large ones are caught."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.nightly
@pytest.mark.timeout(2400, func_only=True)
def test_faults_in_a_real_stack_are_refused_below_and_caught_behind(tmp_path: Path) -> None:
    """Twenty prompts, each struck by every fault on both sides, and 500 held-out ones."""
    path = tmp_path / "self-test.json"
    command = [sys.executable, "-m", "kvkeep", "check", "self-test", "--json", str(path)]
    environment = {
        "XDG_STATE_HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "HOME": str(Path.home()),
    }

    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-4000:]
    stand = json.loads(path.read_text())["stands"][1]
    assert (stand["stand"], stand["pairs"], stand["false_alarms"]) == ("stack", 500, 0)
    assert [each["planted"] for each in stand["store"]] == [20] * len(stand["store"])
    assert all(each["caught"] == each["planted"] for each in stand["store"])
