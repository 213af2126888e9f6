"""Answers that a daemon gives piece by piece: about its tiers, and about misses."""

import json
from collections.abc import Iterator
from typing import Any

from kvkeep.client.connection import Connection
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import UnavailableError
from kvkeep.protocol import messages as m

PATIENCE_S = 120.0
"""For the next piece of an answer: a far store may take long to list its names."""


def told(connection: Connection, request: m.Message) -> Iterator[dict[str, Any]]:
    """Every piece of the answer to a question about tiers or misses, as it comes.

    Raises:
        UnavailableError: The daemon could not do it, in its words, or does not answer.
    """
    connection.send(request)
    request_id = getattr(request, "request_id")  # noqa: B009 - requests have it, Message has not
    clock = SystemClock()
    deadline_s = clock.now_s() + PATIENCE_S
    while (left_s := deadline_s - clock.now_s()) > 0:
        for answer in connection.receive(left_s):
            if not isinstance(answer, m.Told) or answer.request_id != request_id:
                continue
            deadline_s = clock.now_s() + PATIENCE_S
            part = json.loads(answer.text)
            if "error" in part:
                raise UnavailableError(str(part["error"]))
            if not part.get("is_done"):
                yield part
            if answer.is_last:
                return
    raise UnavailableError(f"no answer within {PATIENCE_S:.0f} s: see the daemon's log")
