"""How far one request and its response can be."""

from enum import Enum


class ExchangeState(Enum):
    """How far an exchange is."""

    NEW = 0
    CONNECTING = 1
    SENT = 2
    """The request, or its beginning, is on its way; nothing came back."""
    ANSWERING = 3
    """The client has the response's head."""
    OVER = 4

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a call of Python


TRANSITIONS: dict[ExchangeState, frozenset[ExchangeState]] = {
    ExchangeState.NEW: frozenset(
        {ExchangeState.CONNECTING, ExchangeState.SENT, ExchangeState.OVER}
    ),
    ExchangeState.CONNECTING: frozenset(
        {ExchangeState.CONNECTING, ExchangeState.SENT, ExchangeState.OVER}
    ),
    ExchangeState.SENT: frozenset(
        {
            ExchangeState.CONNECTING,
            ExchangeState.SENT,
            ExchangeState.ANSWERING,
            ExchangeState.OVER,
        }
    ),
    ExchangeState.ANSWERING: frozenset({ExchangeState.OVER}),
    ExchangeState.OVER: frozenset(),
}
"""The legal moves; anything else is a defect of kvkeep."""
