"""What a daemon can be told about sequences: a section of its settings, and none by default."""

from typing import Annotated, Any

import msgspec

from kvkeep.model.sizes import parse_bytes

SIZE_FIELDS = ("bytes_max", "body_bytes_max", "transfer_bytes_max")
"""Fields in which ``2GiB`` style is understood."""

Bytes = Annotated[int, msgspec.Meta(ge=1 << 16, le=1 << 46)]


class SequenceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The listener for sequences, and what they may take."""

    host: str = "127.0.0.1"
    """Address to listen on; any other than loopback needs ``key_file``."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """TCP port; 0 takes a free one, which the daemon prints when it is ready."""
    key_file: str = ""
    """File (mode 0600) that holds the key that clients have to show; empty: none is asked for."""
    bytes_max: Bytes = 1 << 30
    """What all sequences may take together, beside the pool; whole ones make room, the longest
    unused first."""
    body_bytes_max: Bytes = 256 << 20
    """What one body may have and one sequence may take, since it is read in one answer."""
    transfer_bytes_max: Bytes = 512 << 20
    """What all requests in flight may hold together, beside ``bytes_max``; more are told to come
    back."""
    request_s_max: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0
    """How long a body may take to come, and an answer to be read, in seconds."""

    def __post_init__(self) -> None:
        if not self.host or "\0" in self.host + self.key_file:
            raise ValueError("host and key_file must be names without a zero byte")
        if not self.body_bytes_max <= min(self.bytes_max, self.transfer_bytes_max):
            raise ValueError(
                "body_bytes_max is more than bytes_max or transfer_bytes_max: lower it, since a "
                "sequence is kept and sent whole"
            )


def with_sequence_sizes(section: object) -> object:
    """The section as a file has it, its sizes as numbers.

    Raises:
        InputError: One of them is no size.
    """
    if not isinstance(section, dict):
        return section
    changed: dict[str, Any] = dict(section)
    for name in SIZE_FIELDS:
        if name in changed:
            changed[name] = parse_bytes(changed[name])
    return changed
