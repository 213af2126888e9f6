"""What other work took of the processors."""

import os
import subprocess
import sys

import pytest

from benchmarks.quiet import CORES, CpuReading, foreign_share, read_cpu


def test_work_of_others_is_what_is_busy_and_not_ours() -> None:
    """Half a core of others' work for a second is its part of all cores."""
    before = CpuReading(at_s=10.0, busy_s=100.0, own_s=20.0)
    after = CpuReading(at_s=11.0, busy_s=101.5, own_s=21.0)

    assert foreign_share(before, after) == pytest.approx(0.5 / CORES)


def test_own_work_is_not_foreign() -> None:
    """All that is busy being ours leaves nothing, also when clocks tick apart."""
    before = CpuReading(at_s=0.0, busy_s=0.0, own_s=0.0)

    assert foreign_share(before, CpuReading(1.0, 1.0, 1.01)) == 0.0
    assert foreign_share(before, before) == 0.0


def test_a_reading_counts_this_process() -> None:
    """Processor time this process has used is in its own share."""
    reading = read_cpu()

    assert reading.own_s >= sum(os.times()[:2]) * 0.5
    assert reading.busy_s >= reading.own_s * 0.5


def test_a_child_that_ended_was_ours() -> None:
    """What a command took that a benchmark ran and waited for is not others' work."""
    before = read_cpu()
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)

    assert read_cpu().own_s - before.own_s >= 0.4
