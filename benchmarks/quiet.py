"""How much of the processors other work took while something was measured."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CORES = os.cpu_count() or 1
BUSY_SHARE_MAX = 0.1
"""Of all cores; above it timings say more about the neighbours than about the subject."""


@dataclass(frozen=True)
class CpuReading:
    """Processor time so far, in seconds over all cores."""

    at_s: float
    busy_s: float
    """Of the whole machine, with what its host took away."""
    own_s: float
    """Of this process and its descendants; those that ended count once somebody waited for them."""


def read_cpu() -> CpuReading:
    """Read the processor time of the machine, and of this process with all it started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    busy = user + nice + system + irq + softirq + steal
    return CpuReading(time.perf_counter(), busy / TICKS_PER_S, _own_ticks() / TICKS_PER_S)


def _own_ticks() -> int:
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # gone since the folder was listed
            continue
        pid, parent = int(entry.name), int(fields[1])
        ticks[pid] = sum(int(field) for field in fields[11:15])  # its own and its ended children's
        children.setdefault(parent, []).append(pid)
    total, pending = 0, [os.getpid()]
    while pending:
        pid = pending.pop()
        total += ticks.get(pid, 0)
        pending += children.get(pid, ())
    return total


def foreign_share(before: CpuReading, after: CpuReading) -> float:
    """Return the share of all cores that neither this process nor its descendants used, 0 to 1."""
    capacity = (after.at_s - before.at_s) * CORES
    foreign = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(1.0, max(0.0, foreign / capacity)) if capacity > 0 else 0.0
