"""What the disk tier keeps when its process is killed, and what threads that crowd it see."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from kvkeep.testing.tier_contract import block_key, in_parts, value_bytes, write
from kvkeep.tiers.disk.entries import PAGE_BYTES
from tests.fault.disk_tiers import VALUE_BYTES, found, new_tier

ROOT = Path(__file__).parents[2]


def killed_at(folder: Path, num_calls: int) -> bool:
    """Write, evict and delete in a child that SIGKILL ends in the midst of its n-th write call.

    Half of that call's bytes are written. False when the child came to its end before.
    """
    pid = os.fork()
    if pid == 0:
        try:
            calls = itertools.count(1)
            for name in ("pwrite", "pwritev"):
                setattr(os, name, _killing(getattr(os, name), calls, num_calls))
            tier = new_tier(folder, 4)
            for number in range(4, 7):
                write(tier, [number], VALUE_BYTES)
            tier.delete([block_key(5)])
            write(tier, [7], VALUE_BYTES)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    exit_code = os.waitstatus_to_exitcode(status)
    assert exit_code in (0, -signal.SIGKILL)
    return exit_code != 0


def _killing(
    whole: Callable[..., int], calls: "itertools.count[int]", num_calls: int
) -> Callable[..., int]:
    def call(fd: int, data: object, offset: int) -> int:
        if next(calls) != num_calls:
            return whole(fd, data, offset)
        if isinstance(data, list):
            whole(fd, [data[0][: data[0].nbytes // 2 // PAGE_BYTES * PAGE_BYTES]], offset)
        else:
            assert isinstance(data, bytes | memoryview)
            whole(fd, memoryview(data)[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    return call


def test_sigkill_at_every_write_loses_what_was_in_flight(tmp_path: Path) -> None:
    """Wherever a process ends, values are whole or gone, and only those at hand are gone."""
    for num_calls in itertools.count(1):
        folder = tmp_path / f"tier-{num_calls}"
        with contextlib.closing(new_tier(folder, 4)) as before:
            for number in range(4):
                write(before, [number], VALUE_BYTES)
        is_killed = killed_at(folder, num_calls)
        with contextlib.closing(new_tier(folder, 4)) as after:
            kept = found(after, range(8))
            assert len(kept) >= 3
            assert after.num_rotten == 0
            assert all(write(after, range(10, 14), VALUE_BYTES))
            assert found(after, range(10, 14)) == [10, 11, 12, 13]
        if not is_killed:
            assert kept == [3, 4, 6, 7]
            break
    assert num_calls > 12


def test_a_killed_process_has_kept_what_it_said(tmp_path: Path) -> None:
    """Several threads write until SIGKILL; all that was acknowledged before is there, whole."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.fault.disk_tiers", str(tmp_path / "tier")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    acknowledged = [int(line) for line in itertools.islice(child.stdout, 40)]
    child.kill()
    acknowledged += [int(line) for line in child.stdout if line.endswith("\n")]
    child.stdout.close()
    child.wait()

    with contextlib.closing(new_tier(tmp_path / "tier", 4000)) as tier:
        assert found(tier, acknowledged) == acknowledged
        others = [n for n in range(max(acknowledged) + 50) if n not in acknowledged]
        assert len(found(tier, others)) <= 3


def test_readers_and_writers_of_a_crowded_tier(tmp_path: Path) -> None:
    """Threads that evict each other's values read whole values or none."""
    wrong: list[BaseException] = []
    tier = new_tier(tmp_path / "tier", 6)

    def work(first: int) -> None:
        try:
            for number in range(first, first + 60):
                tier.write(
                    [block_key(number % 20)], [in_parts(value_bytes(number % 20, VALUE_BYTES))]
                )
                found(tier, [(number + 7) % 20, number % 20])
                if number % 5 == 0:
                    tier.delete([block_key(number % 20)])
        except AssertionError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 3, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with contextlib.closing(tier):
        assert wrong == []
        assert tier.num_rotten == 0
