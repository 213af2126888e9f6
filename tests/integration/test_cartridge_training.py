"""A training that is told to stop, as a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.authoring.tiny import TEXT, write_tiny


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_terminated_training_is_gone_on_with(tmp_path: Path) -> None:
    """SIGTERM ends it at the next step; the same command does the rest, and no step twice."""
    (tmp_path / "mill.txt").write_text(TEXT)
    model = write_tiny(tmp_path / "model")
    command = [sys.executable, "-m", "kvkeep", "cartridge", "train", "mill.txt"]
    command += ["--model", str(model), "--id", "mill", "--tokens", "12", "--device", "cpu"]
    command += ["--steps", "40", "--conversations", "16", "--answer-tokens", "4"]
    command += ["--library", "library"]
    # Threads that wait for one another would take longer than such a model does.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as begun:
        assert begun.stderr is not None
        for line in begun.stderr:
            if "step 10 of 40" in line:
                begun.send_signal(signal.SIGTERM)
                break
        _, told = begun.communicate(timeout=180)

    assert begun.returncode == 130
    assert "stopped; the same command goes on from mill.training" in told
    assert not (tmp_path / "library").exists()
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=alone, capture_output=True, timeout=180, check=True
    )
    steps = [each["step"] for each in json.loads(done.stdout)["training"]["steps"]]
    assert steps == list(range(40))
    assert (tmp_path / "mill.training" / "loss.svg").exists()
