"""What the router says when it listens."""

from kvkeep.stack.routing.part import RouterReady, find_ready_line


def test_the_last_announcement_counts() -> None:
    """A log may hold those of earlier starts, lines of others, and half a line."""
    output = b"\n".join(
        [
            b'{"event": "ready", "url": "http://h:1", "admin_url": "http://h:2", "pid": 7}',
            b"2026 INFO something",
            b'{"event": "ready", "url": "http://h:3", "admin_url": "http://h:4", "pid": 8}',
            b'{"event": "other", "url": "http://h:5", "admin_url": "http://h:6"}',
            b'{"event": "ready", "url": "http://h:',
        ]
    )

    assert find_ready_line(output) == RouterReady("ready", "http://h:3", "http://h:4")
    assert find_ready_line(b'{"event": "ready", "socket": "/s"}\n') is None
    assert find_ready_line(b"") is None
