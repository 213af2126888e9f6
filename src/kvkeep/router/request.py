"""What a policy may look at of a request, and how it is found in one."""

from collections.abc import Sequence
from typing import Any

import msgspec

from kvkeep.router.relay.framing import find_field

KEY_BYTES_MAX = 1024
"""Of a routing key, whatever it is made of."""
MODEL_CHARS_MAX = 512
KEY_HEADERS = (b"x-session-id", b"x-user-id", b"x-kvkeep-key")
KEY_FIELDS = ("session_id", "user", "prompt_key", "conversation")
"""Fields of `BodyFields`, in the order in which they are looked for."""
TEXT_FIELDS = ("messages", "prompt", "input")


class RequestView(msgspec.Struct):
    """A request as policies see it; a field nobody needs is not worked out and stays None."""

    path: str
    model: str | None = None
    key: bytes | None = None
    """What keeps requests together: docs/routing.md has the order in which it is looked for."""
    prefix: Sequence[int] | None = None
    """64-bit hashes of the prompt's blocks of tokens or text, chained, first to last."""
    num_tokens: int | None = None
    """Tokens of the prompt, an estimate where it was not tokenized."""
    is_stream: bool | None = None
    cartridge: str | None = None
    """Id of the cartridge that it gets; engines that have it in memory are preferred."""
    note: str = ""
    """What else the header X-Kvkeep-Route says of it."""
    num_counted: int | None = None
    """Tokens of the prompt as the engine counted them; 0 if it answered with an error."""

    def answered(self, num_tokens: int | None, *, is_error: bool) -> None:
        """An engine answered whole; of several the last one decides whether it was an error.

        Args:
            num_tokens: Of the prompt; None if it does not say.
            is_error: Whether its status is one.
        """
        if is_error:
            self.num_counted = 0
        elif num_tokens is not None:
            self.num_counted = num_tokens
        elif self.num_counted == 0:
            self.num_counted = None


class BodyFields(msgspec.Struct):
    """The few fields of a body that say where it should go; everything else is skipped unread."""

    model: msgspec.Raw = msgspec.Raw()
    session_id: msgspec.Raw = msgspec.Raw()
    user: msgspec.Raw = msgspec.Raw()
    prompt_key: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="prompt_cache_key")
    conversation: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(BodyFields)


def parse_fields(body: bytes) -> BodyFields | None:
    """Find the fields of a body; None if it is no JSON object."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None


def find_model(fields: BodyFields) -> str | None:
    """The model that a request names."""
    model = _value(fields.model)
    return model[:MODEL_CHARS_MAX] if isinstance(model, str) else None


def find_key_header(head: bytes) -> bytes | None:
    """What a request's head, as it came, says of the requests that it belongs to."""
    for name in KEY_HEADERS:
        value = find_field(head, name)
        if value:
            return value[:KEY_BYTES_MAX]
    return None


def find_key(fields: BodyFields) -> bytes | None:
    """What keeps a request with others if its head does not say: see ``find_key_header``.

    A session, a user, or how its prompt begins; never an id that is new with each request, nor the
    whole body: either would spread a conversation over all engines.
    """
    for field in KEY_FIELDS:
        named = _value(getattr(fields, field))
        if isinstance(named, dict):
            named = named.get("id")
        if isinstance(named, str | int) and named != "":
            return str(named).encode("utf-8", "surrogatepass")[:KEY_BYTES_MAX]
    for field in TEXT_FIELDS:
        text = bytes(getattr(fields, field))[:KEY_BYTES_MAX]
        if text:
            return text
    return None


def _value(raw: msgspec.Raw) -> Any:
    if not bytes(raw):
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return None
