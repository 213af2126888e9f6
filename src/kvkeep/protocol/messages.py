"""Every message between a client and the daemon, grouped by receiver.

Bytes of KV never travel here: a reply names slots of the shared pool, and the process that owns the
GPU memory copies by itself. Lists of block hashes and of slots are single byte strings, because
unpacking ten thousand small objects would cost more than the lookup.

``request_id`` is chosen by the client, unique per connection, and returned in the reply.
"""

from typing import Annotated, Literal

import msgspec

from kvkeep.model.ids import HASH_BYTES

HASHES_MAX = 1 << 15
"""Blocks per message: a million tokens in blocks of 32, in 1 MiB."""
TEXT_MAX = 4096
NAME_MAX = 256
IDENTITY_PARTS_MAX = 256
KEYS_MAX = 1 << 12
"""Keys in one listing: with their words in JSON, half a MiB."""

Namespace = Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Hashes = Annotated[bytes, msgspec.Meta(max_length=HASHES_MAX * HASH_BYTES)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
Name = Annotated[str, msgspec.Meta(max_length=NAME_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
GroupIdx = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
HeadIdx = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)]
HandoffOutcome = Literal["offered", "not_offered", "whole", "partial", "refused"]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of all messages: an array on the wire, its first element the tag."""


class Layout(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``model.layout.KvLayout`` on the wire; the same fields in the same order."""

    num_layers: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    num_heads: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    page_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    dtype: Text
    page_format: Text


class IdentityPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One of the things that decide a namespace, in words."""

    name: Name
    value: Name
    """Long ones are cut, with a digest of the whole behind."""


# ---- to the daemon


class Hello(Message, frozen=True, tag=1):
    """Open a session; the first message of a connection.

    From a worker it also states that no copy that this process began under an earlier session is
    still in motion.
    """

    version: Count
    role: Text
    """``scheduler``, ``worker`` or ``tool``."""
    engine_id: Text
    layout: Layout | None = None
    """From a worker: how its blocks lie. The first one formats the pool; others must equal it."""
    namespace: Namespace | None = None
    """From a scheduler: what its questions begin under."""
    identity: Annotated[list[IdentityPart], msgspec.Meta(max_length=IDENTITY_PARTS_MAX)] = []
    """From a scheduler: what that namespace is made of; only shown, to explain misses."""


class Acquire(Message, frozen=True, tag=2):
    """Lease the longest readable prefix of these blocks. Answer: Acquired."""

    request_id: Id
    namespace: Namespace
    group_idx: GroupIdx
    hashes: Hashes
    """``HASH_BYTES`` each, in the order of the sequence."""
    lease_s: Seconds
    prefill_tokens_s: Count = 0
    """Tokens a second that this engine computes, as it measured; 0 if it does not know yet."""
    engine_request: Name | None = None
    """What the engine calls the request; only shown, to explain misses."""


class Release(Message, frozen=True, tag=3):
    """Stop reading under these leases. No answer."""

    lease_ids: Annotated[list[Id], msgspec.Meta(max_length=HASHES_MAX)]
    num_loaded: Count = 0
    """Blocks that arrived in engine memory with right digests since the last report."""
    num_failed: Count = 0
    """Blocks that did not."""
    load_us: Count = 0
    """Microseconds spent copying and checking them."""
    num_declined: Count = 0
    """Blocks that were lent and not loaded: the engine computes their tokens sooner."""


class Reserve(Message, frozen=True, tag=4):
    """Offer these blocks' heads ``first_head .. first_head + num_heads - 1``. Answer: Reserved."""

    request_id: Id
    namespace: Namespace
    group_idx: GroupIdx
    hashes: Hashes
    first_head: HeadIdx
    num_heads: HeadIdx
    lease_s: Seconds


class Commit(Message, frozen=True, tag=5):
    """The copies under a write lease have ended. Answer: Committed."""

    request_id: Id
    lease_id: Id
    is_stored: Annotated[bytes, msgspec.Meta(max_length=HASHES_MAX)]
    """One byte per granted block, in the order of the grant: 1 complete, 0 not."""
    store_us: Count = 0
    """Microseconds spent copying."""


class ReportCorrupt(Message, frozen=True, tag=6):
    """These blocks' bytes did not match their digests: never lend them again. No answer."""

    namespace: Namespace
    group_idx: GroupIdx
    hashes: Hashes


class Ping(Message, frozen=True, tag=7):
    """Are you there? Answer: Pong."""

    request_id: Id


class GetStatus(Message, frozen=True, tag=8):
    """Ask for the state of the daemon. Answer: Status."""

    request_id: Id


class Clear(Message, frozen=True, tag=9):
    """Forget every block of the pool. Answer: Cleared."""

    request_id: Id


class ListKeys(Message, frozen=True, tag=10):
    """Name blocks that a tier keeps. Answer: Told."""

    request_id: Id
    tier: Name
    namespace: Namespace | None
    """Only those of this one; nil: of all."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=KEYS_MAX)]


class VerifyTier(Message, frozen=True, tag=11):
    """Read every block of a tier and compare digests. Answer: Told, again and again."""

    request_id: Id
    tier: Name


class ClearTiers(Message, frozen=True, tag=12):
    """Forget every block in these tiers, and let none come back. Answer: Told, for each."""

    request_id: Id
    tiers: Annotated[list[Name], msgspec.Meta(max_length=64)]


class Explain(Message, frozen=True, tag=13):
    """Say why a request, or a prefix, found no more blocks. Answer: Told.

    With neither: the namespaces that engines announced, and the latest requests.
    """

    request_id: Id
    engine_request: Name | None
    """What the engine called the request, or a part of that."""
    namespace: Namespace | None
    """Of the hashes."""
    group_idx: GroupIdx
    hashes: Hashes


class Prefetch(Message, frozen=True, tag=14):
    """Bring blocks of this prefix from lower tiers before a request asks. Answer: Prefetching."""

    request_id: Id
    namespace: Namespace
    group_idx: GroupIdx
    hashes: Hashes
    """In the order of the sequence."""
    prefill_tokens_s: Count = 0
    """Tokens a second that the engine computes for which it is done; 0 if that is not known."""


class ReportHandoff(Message, frozen=True, tag=15):
    """How a prefill that was handed over through the pool went, at one of its ends. No answer."""

    outcome: HandoffOutcome
    """Of a prefill engine: whether it named blocks. Of a decode engine: whether it found the named
    ones, all or not all of them in time, or refused to look for them."""
    num_missed: Count = 0
    """Named blocks that had not come when the wait was over."""
    wait_us: Count = 0
    """Microseconds from the first look for the blocks to the last."""


class KeepCartridge(Message, frozen=True, tag=16):
    """These blocks are a cartridge's. No answer."""

    cartridge_id: Name
    digest: Name
    """Of its manifest."""
    namespace: Namespace
    group_idx: GroupIdx
    hashes: Hashes
    """From its first block on."""
    is_pinned: bool
    """Whether they are to stay in the pool."""


class DropCartridge(Message, frozen=True, tag=17):
    """Forget a cartridge's blocks. Answer: Told."""

    request_id: Id
    cartridge_id: Name
    is_forced: bool
    """Also if it is in use, or pinned."""


# ---- to the client


class Welcome(Message, frozen=True, tag=101):
    """The session is open."""

    version: Count
    generation: Id
    """Of the daemon: leases of an older one are void."""
    pool_path: Text
    pool_id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    """Changes whenever the pool is formatted anew."""
    num_slots: Count
    """0 until a worker's layout has formatted the pool."""
    canary_slot: Count
    """A slot lent to this worker until its session ends, for its start-up canary."""
    lease_s_max: Seconds
    """The longest lease that this daemon grants; to ask for a longer one ends the session."""


class Refused(Message, frozen=True, tag=102):
    """The daemon will not serve this connection and closes it."""

    reason: Text
    """One sentence for a person, with the mend."""


class Acquired(Message, frozen=True, tag=103):
    """The first ``len(slots) / 4`` blocks may be read until the lease ends."""

    request_id: Id
    lease_id: Id
    """0 if there are none."""
    slots: Annotated[bytes, msgspec.Meta(max_length=HASHES_MAX * 4)]
    """uint32 little-endian each."""
    generation: Id
    wait_us: Count = 0
    """Not 0: blocks are on their way from a lower tier; a second answer comes within this time."""


class Reserved(Message, frozen=True, tag=104):
    """Write the blocks whose slot is not ``0xFFFFFFFF``."""

    request_id: Id
    lease_id: Id
    slots: Annotated[bytes, msgspec.Meta(max_length=HASHES_MAX * 4)]


class Committed(Message, frozen=True, tag=105):
    """What became of a commit."""

    request_id: Id
    num_ready: Count
    is_fenced: bool


class Pong(Message, frozen=True, tag=106):
    """I am."""

    request_id: Id


class Status(Message, frozen=True, tag=107):
    """The daemon's state as JSON, the same as ``GET /status``."""

    request_id: Id
    text: str


class Cleared(Message, frozen=True, tag=108):
    """What a Clear did."""

    request_id: Id
    num_cleared: Count
    num_kept: Count
    """Blocks still lent or being written; they go when their leases end."""


class Told(Message, frozen=True, tag=109):
    """Part of the answer to a question about tiers or misses, as JSON."""

    request_id: Id
    is_last: bool
    """False: more of the answer follows."""
    text: str


class Prefetching(Message, frozen=True, tag=110):
    """How much of a Prefetch is under way; nothing more is said of it, and nothing is lent."""

    request_id: Id
    num_accepted: Count
    """Blocks that the daemon looks for in lower tiers. 0: all are readable, no tier may have the
    first that is not, or too many prefetches run."""


ToDaemon = (
    Hello
    | Acquire
    | Release
    | Reserve
    | Commit
    | ReportCorrupt
    | Ping
    | GetStatus
    | Clear
    | ListKeys
    | VerifyTier
    | ClearTiers
    | Explain
    | Prefetch
    | ReportHandoff
    | KeepCartridge
    | DropCartridge
)
ToClient = (
    Welcome
    | Refused
    | Acquired
    | Reserved
    | Committed
    | Pong
    | Status
    | Cleared
    | Told
    | Prefetching
)
