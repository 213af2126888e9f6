"""TCP ports for what a stack starts, kept from everybody else until its programs listen."""

import socket
from collections.abc import Iterable

from kvkeep.model.errors import UnavailableError
from kvkeep.stack.machine import HOST


class HeldPorts:
    """Free ports of 127.0.0.1, each held from its choice on.

    A port that was only asked for is anybody's at once: before its server listens, the kernel may
    give it to another program, to a connection or to another stack that starts. So it stays bound
    here, without listening. The kernel gives no such port away, and a server that sets SO_REUSEADDR
    before it binds to that very port may listen on it all the same. It also stays while a server
    is started again.
    """

    def __init__(self, others: Iterable[int] = ()) -> None:
        """Hold nothing yet.

        Args:
            others: Ports that are somebody's already; none of them is chosen.
        """
        self._others = frozenset(others)
        self._held: dict[int, socket.socket] = {}

    def take(self) -> int:
        """Choose a port and hold it.

        Raises:
            UnavailableError: No port is free.
        """
        passed_over: list[socket.socket] = []
        try:
            while True:
                held = _bound()
                port: int = held.getsockname()[1]
                if port not in self._others:
                    self._held[port] = held
                    return port
                passed_over.append(held)  # else the kernel might choose it again
        finally:
            for each in passed_over:
                each.close()

    def let_go(self, port: int) -> None:
        """Hold a port no longer: for a program that sets no SO_REUSEADDR, right before it starts.

        Does nothing for a port that is not held.
        """
        held = self._held.pop(port, None)
        if held is not None:
            held.close()

    def let_all_go(self) -> None:
        """Hold none any more. Idempotent."""
        for port in list(self._held):
            self.let_go(port)


def _bound() -> socket.socket:
    held = socket.socket()
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((HOST, 0))
    except OSError as error:
        held.close()
        raise UnavailableError(
            f"no TCP port of {HOST} is free ({error.strerror}): end programs that have many "
            "connections, or name ports in the stack file."
        ) from error
    return held
