"""Mooncake Store dies or freezes: values are lost or late, never wrong, and nobody hangs.

That it is full, slow, or behind a cut cable is in test_fault_table.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.testing.tier_contract import block_key, in_parts, read, value_bytes, write
from kvkeep.tiers.mooncake.tier import MooncakeTier
from tests.integration.daemons import wait_until
from tests.servers.listening import children_of
from tests.servers.mooncake import MooncakeStore, mooncake_store, open_tier
from tests.waiting import HANG_S

TIMEOUT_S = 1.0
AT_ONCE_TRIES = 5
"""Of which each would wait for ``TIMEOUT_S``; on a busy machine any one of them may be late."""
BACK_TIMEOUT_S = 90.0


@pytest.fixture
def store() -> Iterator[MooncakeStore]:
    """A store that the test may break."""
    with mooncake_store(1) as running:
        yield running


@pytest.fixture
def tier(store: MooncakeStore) -> Iterator[MooncakeTier]:
    """A tier on it."""
    with opened(store) as tier:
        yield tier


@contextlib.contextmanager
def opened(store: MooncakeStore, **settings: object) -> Iterator[MooncakeTier]:
    """A tier that is closed in the end, whatever happened."""
    tier = open_tier(store, timeout_s=TIMEOUT_S, **settings)
    try:
        yield tier
    finally:
        tier.close()


def seconds_to_fail(call: Callable[[], object]) -> float:
    """How long a call takes to say that the store is away."""
    begun_s = time.perf_counter()
    with pytest.raises(UnavailableError):
        call()
    return time.perf_counter() - begun_s


def is_refused_at_once(call: Callable[[], object]) -> bool:
    """Whether a call is told without a wait that the store is away."""
    return min(seconds_to_fail(call) for _ in range(AT_ONCE_TRIES)) < TIMEOUT_S / 2


def is_right(tier: MooncakeTier, numbers: Sequence[int]) -> bool:
    """Whether all values are there; one that is there and wrong is a failure of the test."""
    try:
        found = read(tier, [block_key(number) for number in numbers])
    except UnavailableError:
        return False
    right = [value_bytes(number) for number in numbers]
    assert all(got in (None, want) for got, want in zip(found, right, strict=True))
    return found == right


def works_again(tier: MooncakeTier, number: int) -> Callable[[], bool]:
    """A question whether a value can be written and read."""

    def ask() -> bool:
        with contextlib.suppress(UnavailableError):
            return write(tier, [number]) == [True] and is_right(tier, [number])
        return False

    return ask


def test_a_second_copy_survives_a_killed_storage() -> None:
    """With two copies of each value every one is read although half the storage is dead."""
    with mooncake_store(2, client_ttl_s=10) as store, opened(store, replica_num=2) as tier:
        assert write(tier, range(16)) == [True] * 16
        store.storages[0].kill()

        wait_until(lambda: is_right(tier, range(16)), "all values are read", BACK_TIMEOUT_S)


def test_a_killed_master_is_noticed_and_found_again(
    store: MooncakeStore, tier: MooncakeTier
) -> None:
    """One call waits for the time limit at most, the next ones not at all; a new master is used."""
    keys = [block_key(1)]
    write(tier, [1])
    store.master.kill()

    assert seconds_to_fail(lambda: read(tier, keys)) < HANG_S
    assert is_refused_at_once(lambda: write(tier, [2]))
    assert is_refused_at_once(lambda: tier.lookup(keys))
    assert is_refused_at_once(lambda: tier.delete(keys))

    store.start_master()
    wait_until(works_again(tier, 3), "a value is written and read", BACK_TIMEOUT_S)


def test_a_frozen_master_hangs_nobody(store: MooncakeStore, tier: MooncakeTier) -> None:
    """It takes connections and never answers; once it runs again, what was there is read."""
    write(tier, [1])
    store.master.freeze()
    try:
        assert seconds_to_fail(lambda: read(tier, [block_key(1)])) < HANG_S
        assert is_refused_at_once(lambda: write(tier, [2]))
    finally:
        store.master.thaw()

    wait_until(lambda: is_right(tier, [1]), "the value is read", BACK_TIMEOUT_S)


def test_a_frozen_storage_hangs_nobody(store: MooncakeStore, tier: MooncakeTier) -> None:
    """A transfer that does not end is ended; nothing is written to the caller's memory later."""
    write(tier, [1])
    room = bytearray(b"\x5a" * len(value_bytes(1)))
    store.storages[0].freeze()
    try:
        failing_s = seconds_to_fail(lambda: tier.read([block_key(1)], [in_parts(room)]))
        before = bytes(room)
    finally:
        store.storages[0].thaw()

    assert failing_s < HANG_S
    wait_until(works_again(tier, 2), "a value is written and read", BACK_TIMEOUT_S)
    assert room == before


def test_a_killed_or_frozen_client_is_replaced(store: MooncakeStore, tier: MooncakeTier) -> None:
    """A crash in Mooncake's library is the loss of one process of the tier, and of no value."""
    write(tier, [1])
    (first,) = tier.pids()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: is_right(tier, [1]), "the value is read", BACK_TIMEOUT_S)
    (second,) = tier.pids()
    os.kill(second, signal.SIGSTOP)

    assert seconds_to_fail(lambda: read(tier, [block_key(1)])) < HANG_S
    assert not Path(f"/proc/{second}").exists()
    wait_until(lambda: is_right(tier, [1]), "the value is read", BACK_TIMEOUT_S)


OWNER = """
import sys, threading
from kvkeep.tiers.mooncake.settings import MooncakeSettings
from kvkeep.tiers.mooncake.tier import MooncakeTier

tier = MooncakeTier(MooncakeSettings(master=sys.argv[1], segment_bytes=1 << 24))
assert tier.wait_ready(90)
print(*tier.pids(), flush=True)
threading.Event().wait()
"""


def test_nothing_outlives_a_killed_owner(store: MooncakeStore) -> None:
    """The processes of a tier end with the process that has the tier, however that ends."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, store.address], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        owner.kill()

    assert len(pids) == 2
    wait_until(lambda: not any(map(is_running, pids)), "the tier's processes ended")


@pytest.mark.parametrize("moment", ["mooncake.program", "mooncake/store"])
def test_no_client_that_still_starts_outlives_a_killed_owner(
    store: MooncakeStore, moment: str
) -> None:
    """Nor one that waits for a master that never answers: its library holds the interpreter."""
    store.master.freeze()
    starting = OWNER.replace("assert tier.wait_ready(90)", "").replace(
        "<< 24", "<< 24, timeout_s=60"
    )
    with subprocess.Popen(
        [sys.executable, "-c", starting, store.address], stdout=subprocess.PIPE
    ) as owner:
        wait_until(lambda: has_reached(children_of(owner.pid), moment), "a client starts")
        (pid,) = children_of(owner.pid)
        owner.kill()

    wait_until(lambda: not is_running(pid), "the client ended")


def has_reached(pids: Sequence[int], moment: str) -> bool:
    """Whether a process was started with this word, or has mapped a file of this name."""
    if not pids:
        return False
    about = Path(f"/proc/{pids[0]}")
    return moment in (about / "cmdline").read_text() or moment in (about / "maps").read_text()


def is_running(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
