"""What happened: the inputs of the core, in the past tense.

``reply_to`` is the shell's token for who asked; the core hands it back in a reply and never looks
inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.model.ids import BlockHash, BlockKey, Holder, LeaseId, Namespace


@dataclass(frozen=True, slots=True)
class ReadAsked:
    """A holder wants to read the longest readable prefix of these blocks."""

    reply_to: int
    holder: Holder
    namespace: Namespace
    group_idx: int
    hashes: Sequence[BlockHash]
    deadline_s: float
    """Monotonic time at which the lease ends by itself."""


@dataclass(frozen=True, slots=True)
class ReadAskedAgain(ReadAsked):
    """The same question once more, as blocks that it waited for may have become readable.

    It counts as one question, and the blocks of its first answer as lent once.
    """

    lease_id: LeaseId
    """Of the first answer, which this one takes the place of; 0 if that lent nothing."""


@dataclass(frozen=True, slots=True)
class BlocksAsked:
    """The daemon wants to keep these blocks where they are, to copy them to a lower tier.

    Each by itself, not as a prefix, and not as a use: what is only copied may still be evicted
    first.
    """

    reply_to: int
    holder: Holder
    keys: Sequence[BlockKey]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class ReadFinished:
    """A holder has stopped reading under these leases; unknown leases are ignored."""

    holder: Holder
    lease_ids: Sequence[LeaseId]


@dataclass(frozen=True, slots=True)
class StoreAsked:
    """A holder has these blocks in its engine and offers to write its heads of them."""

    reply_to: int
    holder: Holder
    namespace: Namespace
    group_idx: int
    hashes: Sequence[BlockHash]
    head_mask: int
    """Bit ``i`` is set if KV head ``i`` of the model will be written."""
    deadline_s: float


@dataclass(frozen=True, slots=True)
class StoreFinished:
    """A holder's copies under a write lease have ended; it will not touch those slots again."""

    reply_to: int
    holder: Holder
    lease_id: LeaseId
    is_stored: Sequence[bool]
    """Per granted block, in the order of the grant: whether its bytes are complete."""


@dataclass(frozen=True, slots=True)
class BlocksFoundCorrupt:
    """A reader's digests did not match; the blocks must never be lent again."""

    namespace: Namespace
    group_idx: int
    hashes: Sequence[BlockHash]


@dataclass(frozen=True, slots=True)
class BlocksDropped:
    """Someone wants these blocks gone; those that are lent go when their leases end."""

    namespace: Namespace
    group_idx: int
    hashes: Sequence[BlockHash]


@dataclass(frozen=True, slots=True)
class HolderLeft:
    """A session ended. Its process may still run, and its copies with it."""

    holder: Holder


@dataclass(frozen=True, slots=True)
class HolderQuiet:
    """Proof that no copy is in motion which this process began under an earlier session."""

    pid: int
    """``UNKNOWN_PID`` proves nothing: others that can't be told apart share it."""
    before_session: int | None = None
    """The session that brought the proof; None if the process is dead and all are over.

    A greeting may be read late, when the same process has given it up, opened another session and
    writes under that one.
    """
    sessions: frozenset[int] | None = None
    """The proof is for copies of these earlier sessions alone; None: of all of the process."""


@dataclass(frozen=True, slots=True)
class BlockRecovered:
    """A slot's header survived a restart and says that its block is complete."""

    key: BlockKey
    slot: int


@dataclass(frozen=True, slots=True)
class WriteRecovered:
    """A slot was being written when the daemon died; this process may still be at it.

    Once for each process that may be: the slot stays behind its fence until all of them are quiet.
    """

    slot: int
    pid: int
    """``UNKNOWN_PID`` keeps the slot fenced for as long as this daemon lives."""


@dataclass(frozen=True, slots=True)
class ClearAsked:
    """Someone wants every block gone."""

    reply_to: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The shell's clock ticked; leases may have ended."""


Event = (
    ReadAsked
    | ReadAskedAgain
    | BlocksAsked
    | ReadFinished
    | StoreAsked
    | StoreFinished
    | BlocksFoundCorrupt
    | BlocksDropped
    | HolderLeft
    | HolderQuiet
    | BlockRecovered
    | WriteRecovered
    | ClearAsked
    | TimePassed
)
