"""The plug-in inside LMCache itself, which lives in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from kvkeep.cartridges.registry import Registry
from tests.unit.cartridges.made import contents, draft

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".venv-peers" / "lmcache" / "bin" / "python"
PROGRAM = Path(__file__).with_name("lmcache_program.py")
NUM_TOKENS = 40


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_lmcache_finds_and_loads_a_cartridge_s_chunks(tmp_path: Path) -> None:
    """Those that a request names, of exactly its tokens, bit by bit; nobody else gets them."""
    assert PYTHON.exists(), "make it first: python -m benchmarks.peers.environments lmcache"
    kv = contents(2, shape=(NUM_TOKENS, 2, 8), token_ids=list(range(1000, 1000 + NUM_TOKENS)))
    with Registry(tmp_path) as registry:
        registry.register_contents(draft("ships"), kv)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONHASHSEED": "0"}
    command = [PYTHON, PROGRAM, tmp_path]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["backends"] == ["LocalCPUBackend", "kvkeep"]
    assert found["keys"] == 2
    assert (found["plain"], found["tagged"], found["plain_after"]) == (0, 2, 0)
    assert found["equal"] == [True] * 8
    assert found["again"] == {"LocalCPUBackend": 2}
