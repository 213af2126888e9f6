"""Somebody touches the files of a daemon that runs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.daemon.settings import DaemonSettings
from tests.integration.daemons import (
    POOL_BYTES,
    START_TIMEOUT_S,
    Daemon,
    Worker,
    connect,
    hashes_of,
    load_right_or_not_at_all,
    opened_prefixes,
    running_daemon,
    spawn,
    wait_until,
)


def cut(pool: Path) -> None:
    """Lose the file's end."""
    os.truncate(pool, POOL_BYTES // 2)


def remove(pool: Path) -> None:
    """Lose the file's name."""
    pool.unlink()


def replace(pool: Path) -> None:
    """Put an empty file in its place."""
    other = pool.with_suffix(".other.pool")
    other.touch(0o600)
    other.rename(pool)


@pytest.mark.parametrize("harm", [cut, remove, replace], ids=lambda harm: harm.__name__)
def test_a_harmed_pool_ends_the_daemon(harm: Callable[[Path], None]) -> None:
    """It says what happened and ends; its successor begins anew and serves."""
    with running_daemon() as daemon:
        with Worker(daemon) as worker:
            worker.store(hashes_of(0, 20))
        process = daemon.process
        assert process is not None
        harm(daemon.pool)
        wait_until(lambda: process.poll() is not None, "it has ended")

        assert process.returncode == 2
        assert "under the daemon: start it again" in daemon.log()

        daemon.kill()
        daemon.start()
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            assert load_right_or_not_at_all(worker, client, hashes_of(0, 20)) == 0
            worker.store(hashes_of(0, 20))
            assert load_right_or_not_at_all(worker, client, hashes_of(0, 20)) == 20


def test_a_lost_lock_file_lets_no_second_daemon_in(tmp_path: Path) -> None:
    """The first daemon's socket stays and answers."""
    with running_daemon() as daemon:
        Path(f"{daemon.socket}.lock").unlink()
        settings = {**daemon.settings, "pool": tmp_path / "other.pool"}
        second = spawn(settings, tmp_path / "log")
        assert second.stdout is not None
        with second.stdout:
            assert second.wait(START_TIMEOUT_S) == 2

        assert "another daemon serves the socket" in (tmp_path / "log").read_text()
        connect(daemon).close()


def test_sockets_that_read_alike_have_pools_of_their_own() -> None:
    """A slash and a dash are not the same place."""
    one, other = DaemonSettings(socket="/a/b-c.sock"), DaemonSettings(socket="/a-b/c.sock")

    assert one.pool_path != other.pool_path


def test_a_daemon_that_dies_leaves_a_socket_that_its_successor_takes() -> None:
    """What nobody listens on any more is in nobody's way."""
    with running_daemon() as daemon:
        daemon.kill()
        assert Path(daemon.socket).is_socket()

        _restart(daemon)


def _restart(daemon: Daemon) -> None:
    daemon.start()
    connect(daemon).close()
