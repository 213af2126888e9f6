"""Engines with NIXL on few cores: which thread runs where, and which one gives way."""

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvkeep.stack.parts import EnginePart

SPINNING = {"VLLM_USE_SPINLOOP_EXT": "1"}
"""Environment of engines: beside NIXL's threads, which poll too, sched_yield would leave them the
cores."""
SEEN_S = 0.5
LOWEST_PRIORITY = 19


def settle(cores_of: Mapping[EnginePart, Sequence[int]]) -> None:
    """Have each engine compute on its own core, and NIXL's threads take what is left of it.

    Not for ranks that share a core: one that polls for a transfer would then keep the core from the
    thread that makes it.

    Args:
        cores_of: The core of each rank, by engine; the engines run.
    """
    for engine, cores in cores_of.items():
        give_back(engine, cores)
    _let_rest(list(cores_of))


def give_back(engine: EnginePart, cores: Sequence[int]) -> None:
    """Have an engine's ranks compute on their own cores.

    NixlConnector on a CPU moves the thread that makes it to the last core (vLLM 0.32,
    nixl/base_worker.py: ``sched_setaffinity(0, ...)``). That is the thread that computes, so all
    engines would share one core and leave the others to NIXL's polling.
    """
    workers = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended
            is_worker = (folder / "comm").read_text().startswith("VLLM::Worker")
            if is_worker and os.getpgid(int(folder.name)) == engine.pid:
                workers.append(int(folder.name))
    # Ranks are started in their order.
    for pid, core in zip(sorted(workers), cores, strict=True):
        os.sched_setaffinity(pid, {core})


def _let_rest(engines: Sequence[EnginePart]) -> None:
    """Have NIXL's threads take only what the engines leave of their cores.

    One thread of each engine polls without a pause: vLLM's agent is made with a pause of 0 (nixl
    1.5.1, nixl_agent.__init__), and no setting changes that. It is the one that works and never
    sleeps while nothing is asked.
    """
    before = [_usage_by_thread(engine) for engine in engines]
    threading.Event().wait(SEEN_S)
    for engine, earlier in zip(engines, before, strict=True):
        for thread, (num_sleeps, num_ticks) in _usage_by_thread(engine).items():
            sleeps_before, ticks_before = earlier.get(thread, (-1, 0))
            if num_sleeps == sleeps_before and num_ticks > ticks_before:
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread, LOWEST_PRIORITY)


def _usage_by_thread(engine: EnginePart) -> dict[int, tuple[int, int]]:
    """How often each thread but processes' first ones has slept, and its time in clock ticks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        pid, thread = int(folder.parts[2]), int(folder.name)
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended
            if pid != thread and os.getpgid(pid) == engine.pid:
                found[thread] = _usage(folder)
    return found


def _usage(thread: Path) -> tuple[int, int]:
    status = dict(line.split(":", 1) for line in (thread / "status").read_text().splitlines())
    fields = (thread / "stat").read_text().rpartition(")")[2].split()
    return int(status["voluntary_ctxt_switches"]), int(fields[11]) + int(fields[12])
