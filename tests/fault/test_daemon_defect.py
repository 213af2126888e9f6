"""A daemon that contradicts itself ends; one whose session code fails ends that session only."""

import sys

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.protocol import messages as m
from tests.integration.daemons import (
    CALL_TIMEOUT_S,
    Worker,
    connect,
    hashes_of,
    load_right_or_not_at_all,
    opened_prefixes,
    running_daemon,
    wait_until,
)

_START = "from kvkeep.cli.main import main; main(['daemon', *sys.argv[1:]])"
DEFECT_IN_CORE = (
    sys.executable,
    "-c",
    "import sys\n"
    "from kvkeep.core.node import NodeState\n"
    "NodeState._clear_asked = lambda *_: 1 // 0\n" + _START,
)
DEFECT_IN_SESSION = (
    sys.executable,
    "-c",
    "import sys\n"
    "from kvkeep.daemon.server import SessionProtocol\n"
    "SessionProtocol._clear = lambda *_: 1 // 0\n" + _START,
)


def test_a_defect_of_the_core_ends_the_daemon_and_its_successor_has_the_blocks() -> None:
    """What it remembers can't be trusted any more; what lies in the pool proves itself."""
    hashes = hashes_of(0, 50)
    with running_daemon(DEFECT_IN_CORE) as daemon:
        with Worker(daemon) as worker:
            worker.store(hashes)
            with pytest.raises(UnavailableError):
                worker.connection.call(m.Clear(1), m.Cleared, CALL_TIMEOUT_S)
        process = daemon.process
        assert process is not None
        wait_until(lambda: process.poll() is not None, "it has ended")
        assert process.returncode not in (0, 2)
        assert "ZeroDivisionError" in daemon.log()
        daemon.kill()

        daemon.start()
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            assert load_right_or_not_at_all(worker, client, hashes) == 50


def test_a_defect_of_a_session_ends_that_session() -> None:
    """Everybody else is served on."""
    with running_daemon(DEFECT_IN_SESSION) as daemon:
        victim, bystander = connect(daemon), connect(daemon)
        with pytest.raises(UnavailableError):
            victim.call(m.Clear(1), m.Cleared, CALL_TIMEOUT_S)
        assert bystander.call(m.Ping(2), m.Pong, CALL_TIMEOUT_S) == m.Pong(2)
        victim.close()
        bystander.close()
        assert daemon.stop() == 0
