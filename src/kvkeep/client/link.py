"""Keeps a connection to a daemon that may die, freeze and come back.

A thread of its own connects and greets, so that nobody else ever waits for that. Whoever uses the
connection reports its loss (``lost``) and goes on without; the thread tries again until there is a
new one. A daemon that is frozen accepts connections through its backlog but does not greet, so the
greeting is the probe.
"""

import logging
import threading
from collections.abc import Callable

from kvkeep.client.connection import Connection
from kvkeep.model.errors import RefusedError, UnavailableError
from kvkeep.protocol import messages as m

log = logging.getLogger(__name__)

RETRY_S = 0.25
"""Between attempts: a restarted daemon is found again within a second."""
GREETING_TIMEOUT_S = 30.0
"""A greeting may wait for the pool to be formatted, or for a frozen daemon to go on."""


class Link:
    """A connection, or the attempt to get one.

    ``connection`` may be read from any thread and is None while there is none. The connection
    itself belongs to one thread.
    """

    def __init__(
        self,
        path: str,
        hello: Callable[[], m.Hello],
        opened: Callable[[Connection], None] | None = None,
    ) -> None:
        """Start looking for the daemon.

        Args:
            path: Of the control socket.
            hello: Makes the greeting.
            opened: Called on the link's thread with a new connection before anyone else sees it;
                may raise UnavailableError to reject it.
        """
        self._path = path
        self._hello = hello
        self._opened = opened
        self._lock = threading.Lock()
        self._found = threading.Event()
        self._stopped = threading.Event()
        self.connection: Connection | None = None
        self.refusal: str | None = None
        """Why the daemon refused the last attempt, if it did."""
        self.num_opened = 0
        self._thread = threading.Thread(target=self._run, name="kvkeep-link", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> Connection | None:
        """The connection, after waiting up to ``timeout_s`` for it or for a refusal."""
        self._found.wait(timeout_s)
        return self.connection

    def lost(self, connection: Connection, reason: object) -> None:
        """Give up this connection, if it is still the current one."""
        with self._lock:
            if self.connection is not connection:
                return
            self.connection = None
            self._found.clear()
            connection.close()
        log.warning("kvkeep daemon lost, going on without: %s", str(reason))

    def close(self) -> None:
        """Stop for good and end the session."""
        self._stopped.set()
        self._thread.join(timeout=1.0)
        with self._lock:
            if self.connection is not None:
                self.connection.close()
                self.connection = None

    def _run(self) -> None:
        while not self._stopped.is_set():
            connection = self.connection
            if connection is None:
                if not self._connect():
                    self._stopped.wait(RETRY_S)
            elif connection.is_hung_up(RETRY_S):
                # Nobody need ask for that: an idle engine finds a restarted daemon as well.
                self.lost(connection, "the daemon is gone")

    def _connect(self) -> bool:
        try:
            connection = Connection.open(
                self._path,
                self._hello(),
                GREETING_TIMEOUT_S,
                is_wanted=lambda: not self._stopped.is_set(),
            )
        except UnavailableError:
            return False
        except RefusedError as error:
            if self.refusal != str(error):
                log.warning("kvkeep daemon refuses this engine: %s", error)
            self.refusal = str(error)
            self._found.set()
            return False
        try:
            if self._opened is not None:
                self._opened(connection)
        except UnavailableError as error:
            log.warning("kvkeep daemon found, but not usable: %s", error)
            connection.close()
            return False
        with self._lock:
            if self._stopped.is_set():
                connection.close()
                return False
            self.refusal = None
            self.num_opened += 1
            self.connection = connection
        self._found.set()
        log.info("kvkeep daemon found. socket=%s", self._path)
        return True
