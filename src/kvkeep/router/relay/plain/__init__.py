"""What the relay reads most, recognized by compiled code; all None where that was not built.

Only ``kvkeep.router.relay.framing`` decides what HTTP is; this is what it need not look at.
"""

try:
    from kvkeep.router.relay.plain._plain import Pump, plain_request, plain_response, whole_chunks
except ImportError:  # without a compiler everything is read in Python
    Pump = plain_request = plain_response = whole_chunks = None  # type: ignore[assignment,misc]

__all__ = ["Pump", "plain_request", "plain_response", "whole_chunks"]
