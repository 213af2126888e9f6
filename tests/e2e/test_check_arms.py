"""Arms on a real engine: equal to the bit from its own cache, the pool and a disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STACK = """\
model: smollm2
exact: true
daemon:
  pool_bytes: 512MiB
  settings: {{planner: load}}
  tiers:
    - {{kind: disk, folder: "{folder}", capacity_bytes: 1GiB}}
engines:
  - name: a
    kv_cache_bytes: 512MiB
    max_model_len: 2048
    connector_settings: {{patience_ms: 5000}}
"""
NAMES = "cold,cached,reset,disk"


@pytest.mark.nightly
@pytest.mark.timeout(600, func_only=True)
def test_every_arm_of_a_real_stack_is_equal_to_the_bit(tmp_path: Path) -> None:
    """Each arm's KV came from where it says, and the disk's from the disk."""
    stack, report = tmp_path / "stack.yaml", tmp_path / "report.json"
    stack.write_text(STACK.format(folder=tmp_path / "disk"))
    command = [sys.executable, "-m", "kvkeep", "check", "determinism", "--stack", str(stack)]
    command += ["--arms", NAMES, "--num-prompts", "2", "--max-tokens", "8", "--json", str(report)]
    environment = {
        "XDG_STATE_HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "HOME": str(Path.home()),
    }

    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-4000:]
    (run,) = json.loads(report.read_text())["runs"]
    assert [arm["name"] for arm in run["arms"]] == ["cold", "fill", *NAMES.split(",")[1:]]
    assert {request["verdict"] for arm in run["arms"] for request in arm["requests"]} == {
        "identical"
    }
    (disk,) = [arm for arm in run["arms"] if arm["name"] == "disk"]
    assert "read from the tier" in disk["check"]["detail"]
