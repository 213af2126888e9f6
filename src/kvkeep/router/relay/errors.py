"""What the relay answers by itself: errors in OpenAI's form, whole or as an event of a stream."""

import json
from typing import Final

REASONS: Final = {
    100: "Continue",
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}
KINDS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    502: "upstream_error",
    503: "overloaded_error",
    504: "upstream_timeout",
}
"""``error.type`` by status; other 4xx are ``invalid_request_error``."""


def error_object(status: int, message: str) -> dict[str, object]:
    """The error as OpenAI's clients read it; ``code`` is the status, as in vLLM."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "internal_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_event(status: int, message: str) -> bytes:
    """The last event of a stream that can't go on: an error is never mistaken for an end.

    OpenAI's clients look for ``error`` in the data of any event.
    """
    return b"data: " + json.dumps(error_object(status, message)).encode() + b"\n\n"


def response(
    status: int,
    body: bytes,
    *,
    fields: str = "",
    is_persistent: bool = True,
    is_for_head: bool = False,
) -> bytes:
    """A whole JSON response.

    Args:
        status: Of HTTP.
        body: JSON.
        fields: Further header lines, each with its line end.
        is_persistent: Whether the connection stays open.
        is_for_head: Whether it answers HEAD, so that the body is only announced.
    """
    head = (
        f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"{fields}{'' if is_persistent else 'Connection: close' + chr(13) + chr(10)}\r\n"
    )
    return head.encode("ascii") + (b"" if is_for_head else body)


def error_response(
    status: int,
    message: str,
    *,
    retry_after_s: int | None = None,
    fields: str = "",
    is_persistent: bool = True,
    is_for_head: bool = False,
) -> bytes:
    """A whole response that says what is wrong and what to do about it."""
    if retry_after_s is not None:
        fields += f"Retry-After: {retry_after_s}\r\n"
    if status == 401:
        fields += "WWW-Authenticate: Bearer\r\n"
    return response(
        status,
        json.dumps(error_object(status, message)).encode(),
        fields=fields,
        is_persistent=is_persistent,
        is_for_head=is_for_head,
    )
