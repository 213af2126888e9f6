"""What several commands share: a session with a daemon, and what it says of itself."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from kvkeep.client.connection import Connection
from kvkeep.daemon.settings import load_settings
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.protocol import messages as m
from kvkeep.protocol.versions import VERSION

GREETING_S = 5.0
"""A daemon greets within milliseconds or is frozen."""


@contextlib.contextmanager
def asked_daemon(socket: str | None, why: str) -> Iterator[Connection]:
    """A session with the daemon of a socket, by default this user's own.

    Raises:
        UnavailableError: Nobody answers there.
    """
    path = load_settings(None, os.environ, {"socket": socket} if socket else {}).socket_path
    try:
        connection = Connection.open(path, m.Hello(VERSION, "tool", why), GREETING_S)
    except UnavailableError as error:
        raise UnavailableError(
            f"{error}: start one with kvkeep daemon, or name --socket"
        ) from error
    try:
        yield connection
    finally:
        connection.close()


def checked_text(text: str, what: str, chars_max: int = m.NAME_MAX) -> str:
    """The same text, if a message to a daemon can hold it.

    Raises:
        InputError: It is too long, or its bytes were no UTF-8.
    """
    if len(text) > chars_max:
        raise InputError(f"{what} has at most {chars_max} characters: give a shorter one")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is no text in UTF-8: type it again") from error
    return text


def ask_status(connection: Connection) -> dict[str, Any]:
    """What ``GET /status`` answers."""
    request = m.GetStatus(connection.next_request_id())
    found: dict[str, Any] = json.loads(connection.call(request, m.Status, GREETING_S).text)
    return found
