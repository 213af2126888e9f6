"""What becomes of requests that could name a cartridge, before an engine is chosen for them."""

from typing import Final

FOUND: Final = {
    "chosen": "requests that got a cartridge",
    "unknown": "requests refused, or computed, because they named a cartridge that is not there",
    "refused": "requests refused because of how they named a cartridge, or of what came with it",
    "unread": "requests too large to be looked through for the name of a cartridge",
}
"""What was found in requests, to help text."""


class DispatchRefusal(Exception):
    """A request is answered with an error before any engine is asked; the text says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
