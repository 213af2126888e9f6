"""Whether a Unix socket is somebody's: asked before its path is taken."""

import socket
from pathlib import Path


def is_served(path: Path) -> bool:
    """Whether somebody listens on this socket; what a dead process left refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return True  # its backlog is full
        except OSError:
            return False
        return True
