"""The ledger of one pool: which block lies in which slot, and in what state.

A slot is in exactly one of these places: the free list, a block that is in the index (WRITING or
READY), a block that was taken out of the index but is still lent (DOOMED), or behind a fence
(FENCED: its writer may still be writing, nobody may use it).
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from enum import Enum

from kvkeep.core.eviction.base import EvictionPolicy, fingerprint_of
from kvkeep.core.quotas import Account, Accounts
from kvkeep.model.errors import InvariantError
from kvkeep.model.ids import UNKNOWN_PID, BlockHash, BlockKey, Namespace


class BlockState(Enum):
    """Where a slot stands."""

    FREE = "free"
    WRITING = "writing"
    READY = "ready"
    DOOMED = "doomed"
    FENCED = "fenced"


class Move(Enum):
    """What can happen to a slot."""

    WRITE_BEGUN = "write begun"
    WRITE_FINISHED = "write finished"
    WRITE_FAILED = "write failed"
    WRITER_LOST = "writer lost"
    WRITER_QUIET = "writer quiet"
    RECOVERED = "recovered"
    RECOVERED_WRITING = "recovered while written"
    EVICTED = "evicted"
    DOOMED = "doomed"
    LAST_READER_LEFT = "last reader left"


TRANSITIONS: dict[BlockState, dict[Move, BlockState]] = {
    BlockState.FREE: {
        Move.WRITE_BEGUN: BlockState.WRITING,
        Move.RECOVERED: BlockState.READY,
        Move.RECOVERED_WRITING: BlockState.FENCED,
    },
    BlockState.WRITING: {
        Move.WRITE_FINISHED: BlockState.READY,
        Move.WRITE_FAILED: BlockState.FREE,
        Move.WRITER_LOST: BlockState.FENCED,
        Move.DOOMED: BlockState.FENCED,
    },
    BlockState.READY: {
        Move.EVICTED: BlockState.FREE,
        Move.DOOMED: BlockState.DOOMED,
    },
    BlockState.DOOMED: {Move.LAST_READER_LEFT: BlockState.FREE},
    BlockState.FENCED: {Move.WRITER_QUIET: BlockState.FREE},
}
"""The legal moves; anything else is a defect of kvkeep and stops the daemon."""

STORY_MOVES_MAX = 8
"""Moves remembered per slot, for the message of an illegal one."""


class Slot:
    """One place of the pool. Only the ledger changes it."""

    __slots__ = (
        "account",
        "idx",
        "key",
        "missing_heads",
        "num_pins",
        "num_writers",
        "state",
        "story",
        "writer_pid",
        "writing_heads",
    )

    def __init__(self, idx: int) -> None:
        self.idx = idx
        self.state = BlockState.FREE
        self.key: BlockKey | None = None
        self.account: Account | None = None
        """Whose block is in it; None where the index has none."""
        self.num_pins = 0
        """Read leases on it."""
        self.missing_heads = 0
        """Bit ``i`` is set while KV head ``i`` has not been committed."""
        self.writing_heads = 0
        """Bit ``i`` is set while a write lease covers KV head ``i``."""
        self.num_writers = 0
        """Writers that are not known to be done with it: leases, and those of a recovery."""
        self.writer_pid = UNKNOWN_PID
        """The process that writes it or last wrote it; unknown if there were several."""
        self.story: deque[Move] = deque(maxlen=STORY_MOVES_MAX)

    def move(self, move: Move) -> None:
        """Make one legal move.

        Raises:
            InvariantError: The move is not in TRANSITIONS; the slot is as before.
        """
        after = TRANSITIONS[self.state].get(move)
        if after is None:
            told = ", ".join(step.value for step in self.story)
            raise InvariantError(
                f"illegal move. slot={self.idx} state={self.state.value} move={move.value} "
                f"key={self.key} story=[{told}]"
            )
        self.story.append(move)
        self.state = after


Space = dict[BlockHash, Slot]
"""The blocks of one namespace and group."""


class BlockLedger:
    """Slots, the index by key, and the free list of one pool.

    Invariants, checked by ``check()``: the index holds exactly the WRITING and READY slots, each
    under its own key; the free list holds exactly the FREE slots; only READY and DOOMED slots are
    pinned; DOOMED slots are pinned; each account's policy knows exactly its READY slots.
    """

    def __init__(
        self,
        num_slots: int,
        num_heads: int,
        policy: EvictionPolicy,
        tenants: Sequence[Account] = (),
    ) -> None:
        """Begin with free slots only.

        Args:
            num_slots: Of the pool.
            num_heads: KV heads of a block.
            policy: Orders the blocks of tenants that have no share of their own.
            tenants: Those that have one.
        """
        self.slots = [Slot(idx) for idx in range(num_slots)]
        self.all_heads = (1 << num_heads) - 1
        self.accounts = Accounts(num_slots, policy, tenants)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))
        self._spaces: dict[tuple[Namespace, int], Space] = {}
        self.num_by_state = dict.fromkeys(BlockState, 0)
        self.num_by_state[BlockState.FREE] = num_slots
        self.num_evicted = 0

    def _move(self, slot: Slot, move: Move) -> None:
        before = slot.state
        slot.move(move)
        self.num_by_state[before] -= 1
        self.num_by_state[slot.state] += 1

    # ---- questions

    def readable_prefix(
        self, namespace: Namespace, group_idx: int, hashes: Sequence[BlockHash]
    ) -> list[Slot]:
        """Slots of the leading blocks that are READY; stops at the first that is not."""
        space = self._spaces.get((namespace, group_idx))
        found: list[Slot] = []
        if space is None:
            return found
        ready, get, append = BlockState.READY, space.get, found.append
        for block_hash in hashes:
            slot = get(block_hash)
            if slot is None or slot.state is not ready:
                break
            append(slot)
        return found

    def find(self, key: BlockKey) -> Slot | None:
        """The slot that holds or is being written with this block."""
        return self._spaces.get((key.namespace, key.group_idx), {}).get(key.block_hash)

    def num_by_namespace(self) -> dict[Namespace, int]:
        """Blocks that are readable or being written, of each namespace that has any."""
        found: dict[Namespace, int] = {}
        for (namespace, _), space in self._spaces.items():
            found[namespace] = found.get(namespace, 0) + len(space)
        return found

    # ---- writing

    def begin_write(self, key: BlockKey) -> Slot | None:
        """Take a free slot for a block that is not in the index; None if no slot is free."""
        if not self._free:
            return None
        slot = self.slots[self._free.popitem(last=False)[0]]
        self._move(slot, Move.WRITE_BEGUN)
        slot.missing_heads = self.all_heads
        self._put(key, slot)
        return slot

    def finish_heads(self, slot: Slot, head_mask: int) -> bool:
        """Count heads as committed; True if that made the block READY."""
        slot.missing_heads &= ~head_mask
        if slot.missing_heads:
            return False
        self._move(slot, Move.WRITE_FINISHED)
        self._account_of(slot).policy.added(slot.idx, fingerprint_of(self._key_of(slot)))
        return True

    def fail_write(self, slot: Slot) -> None:
        """Free a slot whose write ended incomplete; its writers are known to be done."""
        self._drop(slot)
        self._move(slot, Move.WRITE_FAILED)
        self._release(slot)

    def fence(self, slot: Slot, why: Move = Move.WRITER_LOST) -> None:
        """Put a slot out of reach: nobody wants its block, and its writer may still write."""
        self._drop(slot)
        self._move(slot, why)

    def unfence(self, slot: Slot) -> None:
        """Free a fenced slot: its writer is proven quiet."""
        self._move(slot, Move.WRITER_QUIET)
        self._release(slot)

    # ---- recovery

    def recover(self, key: BlockKey, slot_idx: int) -> bool:
        """Take over a complete block found in the pool; False if its key is there already."""
        slot = self.slots[slot_idx]
        if self.find(key) is not None:
            return False
        self._move(slot, Move.RECOVERED)
        del self._free[slot_idx]
        self._put(key, slot)
        self._account_of(slot).policy.added(slot_idx, fingerprint_of(key))
        return True

    def recover_writing(self, slot_idx: int) -> Slot:
        """Fence a slot that was being written when the last daemon died."""
        slot = self.slots[slot_idx]
        self._move(slot, Move.RECOVERED_WRITING)
        del self._free[slot_idx]
        return slot

    # ---- reading

    def pin(self, slots: Sequence[Slot]) -> None:
        """Keep READY blocks where they are until ``unpin``."""
        for slot in slots:
            slot.num_pins += 1

    def unpin(self, slots: Sequence[Slot], *, is_use: bool = True) -> list[Slot]:
        """Undo one ``pin``, count the use if it was one, and return the slots that this freed.

        Slots are touched from the last to the first, so that of one prefix the tail is evicted
        before the head: a prefix without its head is worth nothing.
        """
        freed = []
        for slot in reversed(slots):
            slot.num_pins -= 1
            if slot.state is BlockState.READY:
                account = slot.account
                if is_use and account is not None:
                    account.policy.used(slot.idx)
            elif slot.num_pins == 0:
                self._move(slot, Move.LAST_READER_LEFT)
                self._release(slot)
                freed.append(slot)
        return freed

    # ---- making room

    def evict(self, num_blocks: int, namespace: Namespace) -> list[Slot]:
        """Empty up to ``num_blocks`` unpinned slots for blocks of this namespace.

        Whose blocks go, the quotas say; which of theirs, their policies choose.
        """
        accounts = self.accounts
        mine = accounts.find(namespace)
        num_within = mine.quota - mine.num_held - self.num_free
        num_due = max(0, min(num_blocks, num_within))
        evicted: list[Slot] = []
        for account in accounts.over_quota() if num_due else ():
            if account is not mine:
                num_wanted = min(account.num_over, num_due - len(evicted))
                evicted += self._evict_of(account, num_wanted)
        evicted += self._evict_of(mine, num_blocks - len(evicted))
        for account in accounts.all if accounts.is_owed(mine) else ():
            evicted += self._evict_of(account, num_blocks - len(evicted))
        self.num_evicted += len(evicted)
        return evicted

    def _evict_of(self, account: Account, num_blocks: int) -> list[Slot]:
        victims = account.policy.victims(num_blocks, lambda idx: not self.slots[idx].num_pins)
        slots = [self.slots[idx] for idx in victims]
        for slot in slots:
            self._forget(slot)
        return slots

    def doom(self, slot: Slot) -> bool:
        """Take a READY block out of the index for good; True if its slot is free at once."""
        if slot.num_pins == 0:
            self._forget(slot)
            return True
        self._account_of(slot).policy.removed(slot.idx)
        self._drop(slot)
        self._move(slot, Move.DOOMED)
        return False

    def ready_slots(self) -> list[Slot]:
        """Every READY slot, by index."""
        return self._slots_in(BlockState.READY)

    def writing_slots(self) -> list[Slot]:
        """Every WRITING slot, by index."""
        return self._slots_in(BlockState.WRITING)

    @property
    def num_free(self) -> int:
        """Slots that can be written at once."""
        return len(self._free)

    # ---- inside

    def _slots_in(self, state: BlockState) -> list[Slot]:
        return [slot for slot in self.slots if slot.state is state]

    def _forget(self, slot: Slot) -> None:
        self._account_of(slot).policy.removed(slot.idx)
        self._drop(slot)
        self._move(slot, Move.EVICTED)
        self._release(slot)

    def _put(self, key: BlockKey, slot: Slot) -> None:
        slot.key = key
        slot.account = self.accounts.find(key.namespace)
        slot.account.num_held += 1
        self._spaces.setdefault((key.namespace, key.group_idx), {})[key.block_hash] = slot

    def _key_of(self, slot: Slot) -> BlockKey:
        if slot.key is None:
            raise InvariantError(f"a slot without a key is in the index. slot={slot.idx}")
        return slot.key

    def _account_of(self, slot: Slot) -> Account:
        if slot.account is None:
            raise InvariantError(f"a block in the index is nobody's. slot={slot.idx}")
        return slot.account

    def _drop(self, slot: Slot) -> None:
        key = self._key_of(slot)
        self._account_of(slot).num_held -= 1
        slot.account = None
        space = self._spaces[(key.namespace, key.group_idx)]
        del space[key.block_hash]
        if not space:
            del self._spaces[(key.namespace, key.group_idx)]

    def _release(self, slot: Slot) -> None:
        if slot.num_writers or slot.num_pins:
            raise InvariantError(f"a slot in use was freed. slot={slot.idx}")
        slot.key = None
        slot.missing_heads = slot.writing_heads = 0
        slot.writer_pid = UNKNOWN_PID
        self._free[slot.idx] = None

    def check(self) -> None:
        """Assert every invariant; costs O(slots), for tests and the end of a recovery."""
        indexed = {
            slot.idx: (space_key, block_hash)
            for space_key, space in self._spaces.items()
            for block_hash, slot in space.items()
        }
        free = sorted(self._free)
        if free != [slot.idx for slot in self.slots if slot.state is BlockState.FREE]:
            raise InvariantError("the free list and the free slots differ")
        for slot in self.slots:
            is_indexed = slot.state in (BlockState.WRITING, BlockState.READY)
            key = slot.key
            if is_indexed != (slot.idx in indexed):
                raise InvariantError(f"index and state differ. slot={slot.idx}")
            if is_indexed and (
                key is None or indexed[slot.idx] != ((key.namespace, key.group_idx), key.block_hash)
            ):
                raise InvariantError(f"a block lies under another key. slot={slot.idx} key={key}")
            if slot.num_pins < 0 or ((slot.state is BlockState.DOOMED) and not slot.num_pins):
                raise InvariantError(f"pins don't fit the state. slot={slot.idx}")
            if slot.num_pins and slot.state not in (BlockState.READY, BlockState.DOOMED):
                raise InvariantError(f"a slot without bytes is lent. slot={slot.idx}")
        self._check_accounts()
        for state, num in self.num_by_state.items():
            if num != sum(slot.state is state for slot in self.slots):
                raise InvariantError(f"the count of slots is off. state={state.value}")

    def _check_accounts(self) -> None:
        for account in self.accounts.all:
            held = [slot for slot in self.slots if slot.account is account]
            ready = [slot.idx for slot in held if slot.state is BlockState.READY]
            if len(held) != account.num_held:
                raise InvariantError(f"a tenant's count of blocks is off. tenant={account.name!r}")
            if sorted(account.policy.victims(len(self.slots), lambda _: True)) != ready:
                raise InvariantError("the eviction policy and the READY slots differ")
        for slot in self.slots:
            is_indexed = slot.state in (BlockState.WRITING, BlockState.READY)
            if is_indexed != (slot.account is not None):
                raise InvariantError(f"a block is nobody's, or no block is. slot={slot.idx}")
