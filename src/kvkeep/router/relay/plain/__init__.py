"""What the relay reads most, recognized by compiled code; all None where that was not built.

Only ``kvkeep.router.relay.framing`` decides what HTTP is; this is what it need not look at.
"""

try:
    from kvkeep.router.relay.plain._plain import (
        Pump,
        find_tokens,
        plain_request,
        plain_response,
        whole_chunks,
    )
except ImportError:  # without a compiler everything is read in Python
    Pump = find_tokens = None  # type: ignore[assignment,misc]
    plain_request = plain_response = whole_chunks = None  # type: ignore[assignment]

__all__ = ["Pump", "find_tokens", "plain_request", "plain_response", "whole_chunks"]
