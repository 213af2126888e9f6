"""The soak finds what is wrong, and says what it can not do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak.load import LAYOUT, Ledger, prove
from tests.integration.daemons import Worker, acquire, hashes_of, opened_prefixes, running_daemon

ROOT = Path(__file__).parents[2]


def test_wrong_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that holds other bytes than it must, though its digest fits, is wrong."""
    ledger = Ledger(1)
    with (
        running_daemon() as daemon,
        Worker(daemon, layout=LAYOUT) as worker,
        opened_prefixes(daemon) as client,
    ):
        worker.store(hashes_of(0, 8))
        lease = acquire(client, hashes_of(0, 8))
        assert lease is not None
        assert prove(worker, ledger, hashes_of(0, 8), lease) == 8
        monkeypatch.setattr("benchmarks.soak.load.payload_of", lambda *_: bytes(8))
        prove(worker, ledger, hashes_of(0, 8), lease)
        client.release([lease])

    assert (ledger.counts["right"], ledger.counts["wrong"]) == (8, 8)


def test_a_wrong_duration_is_one_sentence() -> None:
    """It ends with code 2 and says what to choose."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--minutes", "0"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (done.returncode, done.stderr) == (2, "--minutes 0: choose 0.5 to 10000.\n")
