"""TCP ports for what a stack starts, kept from everybody else until its programs listen."""

import socket
from collections.abc import Iterable

from kvkeep.model.errors import UnavailableError
from kvkeep.stack.machine import HOST

PORT_MAX = 65_535
TRIES_MAX = 100
"""Rows of ports that are looked at."""


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

    def take(self, count: int = 1) -> int:
        """Choose a port, or several in a row, and hold them.

        Returns:
            The first of them.

        Raises:
            UnavailableError: No port is free, or nowhere so many in a row.
        """
        passed_over: list[socket.socket] = []
        try:
            for _ in range(TRIES_MAX):
                row = _bound_row(count)
                ports: list[int] = [each.getsockname()[1] for each in row]
                if len(row) == count and self._others.isdisjoint(ports):
                    self._held |= zip(ports, row, strict=True)
                    return ports[0]
                passed_over += row  # else the kernel might choose it again
        finally:
            for each in passed_over:
                each.close()
        raise UnavailableError(
            f"no {count} ports of {HOST} in a row were found free: end programs that have many."
        )

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


def _bound_row(count: int) -> list[socket.socket]:
    """So many ports in a row, or fewer where the next one is somebody's."""
    row = [_bound()]
    first: int = row[0].getsockname()[1]
    for port in range(first + 1, min(first + count, PORT_MAX + 1)):
        try:
            row.append(_bound(port))
        except UnavailableError:
            break
    return row


def _bound(port: int = 0) -> socket.socket:
    held = socket.socket()
    try:
        # Another stack may hold a port that is named, and share it as this one does: only a socket
        # that does not share is told so. The kernel gives away none that is held.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, not port)
        held.bind((HOST, port))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError as error:
        held.close()
        raise UnavailableError(
            f"no TCP port of {HOST} is free ({error.strerror}): end programs that have many "
            "connections, or name ports in the stack file."
        ) from error
    return held
