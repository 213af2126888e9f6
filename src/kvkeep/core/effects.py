"""What to do next: the outputs of the core, in the imperative."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.model.ids import BlockKey, LeaseId

NO_SLOT = 0xFFFFFFFF
"""In a list of slots: nothing to write here, the block is stored, being stored or unwanted."""


@dataclass(frozen=True, slots=True)
class ReplyRead:
    """Answer a ReadAsked: the first ``len(slots)`` blocks may be read.

    To a BlocksAsked: one slot for each key, ``NO_SLOT`` where the block is not readable.
    """

    reply_to: int
    lease_id: LeaseId
    """0 if there is nothing to read."""
    slots: Sequence[int]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class ReplyStore:
    """Answer a StoreAsked: write the blocks whose slot is not ``NO_SLOT``."""

    reply_to: int
    lease_id: LeaseId
    """0 if there is nothing to write."""
    slots: Sequence[int]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class ReplyStored:
    """Answer a StoreFinished with the number of blocks that it made readable."""

    reply_to: int
    num_ready: int
    is_fenced: bool
    """The lease was over or unknown: nothing of it counts."""


@dataclass(frozen=True, slots=True)
class ReplyCleared:
    """Answer a ClearAsked."""

    reply_to: int
    num_cleared: int
    num_kept: int
    """Blocks still lent or being written: they go when their leases end."""


@dataclass(frozen=True, slots=True)
class MarkWriting:
    """Write the slot's header: a write begins, its bytes mean nothing until MarkReady."""

    slot: int
    key: BlockKey
    lease_id: LeaseId
    pid: int
    """Whom a recovery has to wait for; ``UNKNOWN_PID`` once a second process writes here too."""


@dataclass(frozen=True, slots=True)
class MarkReady:
    """Write the slot's header: its bytes are the block's."""

    slot: int
    key: BlockKey


@dataclass(frozen=True, slots=True)
class MarkFree:
    """Write the slot's header: it holds nothing."""

    slot: int


@dataclass(frozen=True, slots=True)
class WatchProcess:
    """Tell the core (HolderQuiet) once this process is dead; at once if it is."""

    pid: int


Effect = (
    ReplyRead
    | ReplyStore
    | ReplyStored
    | ReplyCleared
    | MarkWriting
    | MarkReady
    | MarkFree
    | WatchProcess
)
