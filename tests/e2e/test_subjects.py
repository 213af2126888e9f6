"""``kvkeep check`` on subjects that are not kvkeep; nightly.

What each needs beside a vLLM: Mooncake the package of ``kvkeep[mooncake]``, LMCache an environment
of its own, which is made at the first run (minutes, and a package index). The suites and sizes are
those that kvkeep itself passes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.environments import ROOT, python_of

pytestmark = [
    pytest.mark.kvbm,
    pytest.mark.nightly,
    pytest.mark.timeout(900, func_only=True),
]


def checked(suite: str, example: str, folder: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, the one run of the report, and what was said."""
    report = folder / "report.json"
    stack = ROOT / "examples" / "subjects" / f"{example}.yaml"
    command = [sys.executable, "-m", "kvkeep", "check", suite, "--stack", str(stack)]
    command += ["--max-iterations", "6", "--max-tokens", "16", "--json", str(report)]
    # A user's own state folder is not the tests' to write to; programs are named from the root.
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("KVBM_")},
        "XDG_STATE_HOME": str(folder),
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stderr[-2000:] + done.stdout[-2000:]
    (run,) = json.loads(report.read_text())["runs"]
    return done.returncode, run, done.stdout[-4000:]


@pytest.mark.parametrize("kind", ["lmcache", "mooncake"])
def test_a_subject_is_judged_like_kvkeep(kind: str, tmp_path: Path) -> None:
    """It is known for what it is, its KV came from outside, and every answer is right."""
    if kind == "lmcache":
        python_of("lmcache")

    code, run, said = checked("determinism", kind, tmp_path)

    assert run["subject"]["kind"] == kind, said
    assert run["served"]["share"] >= 0.8, said
    assert (code, run["outcome"]) == (0, "passed"), said
