"""A daemon whose disk is full, fails, refuses writes, is slow or stands still.

A full disk is a small tmpfs, a failing one a device that has lost its end. What must come and go at
a certain moment is a shim around the calls that move values (``shimmed_daemon``): a file system
that became read-only stays so, and the kernels of test machines have no device that hangs.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fault.media import Medium, Site, attached, opened_medium, running_site
from tests.fault.small_disks import failing_disk, filled, lost_end, small_tmpfs
from tests.integration.daemons import NAMESPACE, hashes_of, payload_of, wait_until

HASHES = hashes_of(0, 48)
OTHERS = hashes_of(1000, 48)
PIECE_BYTES = 4096
"""Of a block, enough to find it on a device."""
WORDS = ["EIO", "EROFS", "ENOSPC", "slow", "hang"]


@dataclass(frozen=True)
class Shimmed:
    """A daemon with a shim, and the file that says what its disk does."""

    site: Site
    said: Path


@contextlib.contextmanager
def opened_shimmed(folder: Path) -> Iterator[Shimmed]:
    """One that has cascaded a prefix and served it from its disk."""
    said = folder / "said"
    command = (sys.executable, "-m", "tests.fault.shimmed_daemon", str(said))
    with opened_medium("disk", folder) as medium, running_site(medium, folder, command) as site:
        site.cascade(HASHES)
        site.wait_for_service(HASHES)
        yield Shimmed(site, said)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shimmed]:
    """A daemon that outlives every fault of its disk."""
    with opened_shimmed(tmp_path_factory.mktemp("lasting")) as shimmed:
        yield shimmed


@contextlib.contextmanager
def disk_that(said: Path, word: str) -> Iterator[None]:
    """Have the disk do so for a while."""
    said.write_text(word)
    try:
        yield
    finally:
        said.unlink()


@pytest.mark.parametrize("word", WORDS)
def test_a_disk_that_fails_costs_no_answer(lasting: Shimmed, word: str) -> None:
    """Misses within what was announced, the pool serves on, and then all is served again."""
    site = lasting.site
    with disk_that(lasting.said, word):
        site.ask_while_broken(HASHES, OTHERS)

    site.wait_for_service(HASHES)
    site.wait_for_service(OTHERS)


@pytest.mark.parametrize(
    ("word", "number"),
    [("slow", signal.SIGTERM), ("hang", signal.SIGTERM), ("slow", signal.SIGKILL)],
)
def test_a_daemon_that_ends_while_blocks_come_from_its_disk(
    tmp_path: Path, word: str, number: signal.Signals
) -> None:
    """Politely in a bounded time with code 0; either way the next one serves right bytes only."""
    with opened_shimmed(tmp_path) as shimmed:
        site, daemon = shimmed.site, shimmed.site.daemon
        site.settle()
        site.clear_pool()
        # It stands still until the promotion was seen, which a slow one might end before.
        with disk_that(shimmed.said, "hang"):
            assert site.client.ask(NAMESPACE, 0, HASHES) is not None
            wait_until(lambda: daemon.gauge("write_leases") == 2, "a promotion is under way")
            shimmed.said.write_text(word)
            if number is signal.SIGTERM:
                assert daemon.stop() == 0
            else:
                daemon.kill()
        daemon.start()
        with attached(daemon) as again:
            assert daemon.gauge("slots_fenced") == 0
            again.serve(HASHES)
            again.wait_for_service(HASHES)


# --- Disks that are really so ---------------------------------------------------------------------


@pytest.mark.root
def test_a_disk_without_room_takes_nothing_until_it_has_some(tmp_path: Path) -> None:
    """Nothing is kept there and the pool serves on; with room again the same daemon keeps all."""
    with small_tmpfs(tmp_path / "disk") as disk, contextlib.ExitStack() as full:
        reserve = disk / "reserve"
        reserve.write_bytes(bytes(1 << 20))
        full.enter_context(filled(disk))
        # Headers find room now, and a file for values does not.
        reserve.unlink()
        medium = Medium({"kind": "disk", "folder": str(disk / "tier"), "capacity_bytes": "8MiB"})
        with running_site(medium, tmp_path) as site:
            site.cascade(HASHES)
            site.ask_while_broken(HASHES, OTHERS)
            assert site.daemon.counter("blocks_cascaded") == 0
            full.close()

            site.wait_for_service(HASHES)


@pytest.mark.root
def test_a_device_that_loses_its_end(tmp_path: Path) -> None:
    """What lay there is a miss, with an error of the device; whole again, all is served."""
    with failing_disk(tmp_path) as disk:
        medium = Medium({"kind": "disk", "folder": str(disk / "tier"), "capacity_bytes": "8MiB"})
        with running_site(medium, tmp_path) as site:
            site.cascade(HASHES)
            site.wait_for_service(HASHES)
            with lost_end(disk, payload_of(HASHES[4])[:PIECE_BYTES].tobytes()):
                site.ask_while_broken(HASHES, OTHERS)

            assert "Input/output error" in site.daemon.log()
            site.wait_for_service(HASHES)
            site.wait_for_service(OTHERS)
