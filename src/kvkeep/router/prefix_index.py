"""Which endpoint holds the blocks of which prefix, as far as the router can know.

News comes from three sides: the router's own choices (an endpoint that is sent a prompt will hold
it), the events of engines, and what responses say about the tokens they did not compute. An
endpoint whose events are heard is believed in what they say; of any other the router keeps a model,
least recently used blocks going first, whose size is corrected by the responses.

It may be wrong and never matters for what is answered: an error costs a worse choice of endpoint.

Threading and blocking: the event loop's thread; never blocks. ``match`` needs one look-up per block
until no endpoint is left that holds all blocks so far.
"""

import logging
from collections.abc import Iterator, Sequence

from kvkeep.model.announced import POOL_MEDIUM
from kvkeep.router.events.block_events import (
    ENGINE_MEDIUM,
    AllBlocksCleared,
    BlockEvent,
    BlockRemoved,
    BlockStored,
    extra_key_bytes,
)
from kvkeep.router.events.named_blocks import NamedBlocks, oldest
from kvkeep.router.events.pool_blocks import PoolBlocks, number_in
from kvkeep.router.prefix_hashes import HASH_MASK, token_hashes, token_root

log = logging.getLogger(__name__)

BLOCKS_MAX = 5 << 16
"""Default number of blocks known: ten million tokens in blocks of 32, in at most 84 MB. Less than a
third of a power of two, because a dict that loses and gains entries doubles when a third of its
slots is used."""

SILENT_PROMPTS = 8
"""Prompts in a row that an engine answered without an event of any, though they had new blocks:
its publisher hangs, and what it does not say is no reason to think that it holds nothing."""

CAPACITY_DECAY = 0.9
CAPACITY_GROWTH = 1.02


class _Medium:
    """What one endpoint holds in one place: its cache, or the tiers behind it."""

    __slots__ = ("bit", "named")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.named = NamedBlocks()
        """By the engine's hash, which is all that a removal names."""


class _Holder:
    """One endpoint."""

    __slots__ = ("assumed", "blocks_max", "cache", "has_events", "num_unheard", "slot", "tiers")

    def __init__(self, slot: int, blocks_max: int) -> None:
        self.slot = slot
        self.cache = _Medium(1 << (2 * slot))
        self.tiers = _Medium(1 << (2 * slot + 1))
        self.assumed: dict[int, None] = {}
        """Blocks it should hold and has not said so, least recently used first."""
        self.blocks_max = blocks_max
        """How many of those it is thought to have room for."""
        self.has_events = False
        self.num_unheard = 0
        """Prompts since the last event whose new blocks were not told of."""

    @property
    def is_silent(self) -> bool:
        return self.num_unheard >= SILENT_PROMPTS


class PrefixIndex:
    """Blocks and the endpoints that hold them; bounded, least recently used blocks go first."""

    def __init__(self, block_tokens: int, blocks_max: int = BLOCKS_MAX) -> None:
        """Start empty.

        Args:
            block_tokens: Tokens per block. Events of an engine with other blocks are refused.
            blocks_max: Different blocks known, and blocks known of each endpoint; at least 1.
        """
        self.block_tokens = block_tokens
        self.blocks_max = blocks_max
        self.num_refused = 0
        """Events that could not be used: of another block length, or ids out of range."""
        self.refused_block_tokens = 0
        """The block length of the last that had another one; 0 if none had."""
        self.num_orphans = 0
        """Events whose parent block is not known, so that their place in a prefix is not either."""
        self.num_evicted = 0
        self._num_in_tiers = 0
        self.pools = PoolBlocks(blocks_max)
        """What the daemons of hosts keep for engines there."""
        self.num_checked = 0
        """Responses that said how many blocks were held, and so what the belief was worth."""
        self.num_off = 0
        """Of these, where the belief was off by more than one block."""
        self._blocks: dict[int, int] = {}
        # Few sets of endpoints occur; one object stands for each wherever it does.
        self._sets: dict[int, int] = {}
        self._holders: dict[str, _Holder] = {}
        self._by_slot: dict[int, _Holder] = {}

    # ---- questions

    def match(self, prefix: Sequence[int], endpoints: Sequence[str]) -> list[int]:
        """Return how many leading blocks each endpoint holds in its cache."""
        return self._match(prefix, endpoints, in_tiers=False)

    def match_tiers(self, prefix: Sequence[int], endpoints: Sequence[str]) -> list[int]:
        """Return how many leading blocks each endpoint holds in its cache or in tiers behind it."""
        depths = self._match(prefix, endpoints, in_tiers=True)
        if not len(self.pools):
            return depths
        bits = [self._bits_of(endpoint) for endpoint in endpoints]
        return [
            self.pools.extend(prefix, endpoint, depth, self._blocks, own)
            for endpoint, depth, own in zip(endpoints, depths, bits, strict=True)
        ]

    def _bits_of(self, endpoint: str) -> int:
        holder = self._holders.get(endpoint)
        return 0 if holder is None else holder.cache.bit | holder.tiers.bit

    def _match(
        self, prefix: Sequence[int], endpoints: Sequence[str], *, in_tiers: bool
    ) -> list[int]:
        holders = self._holders
        bits = [holders[name].cache.bit if name in holders else 0 for name in endpoints]
        still = 0
        for bit in bits:
            still |= bit
        depths: dict[int, int] = {0: 0}
        blocks = self._blocks
        for depth, block in enumerate(prefix):
            held = blocks.get(block, 0)
            if in_tiers:
                # The bit of the tiers lies just above the one of the cache.
                held |= held >> 1
            lost = still & ~held
            if lost:
                _note(depths, lost, depth)
                still &= held
                if not still:
                    break
        _note(depths, still, len(prefix))
        return [depths[bit] for bit in bits]

    def __len__(self) -> int:
        """Different blocks known."""
        return len(self._blocks)

    @property
    def num_in_tiers(self) -> int:
        """Blocks that are known to lie in tiers."""
        return self._num_in_tiers + len(self.pools)

    def num_blocks(self, endpoint: str) -> int:
        """Blocks that an endpoint said or is assumed to hold, in its cache and in its tiers."""
        holder = self._holders.get(endpoint)
        if holder is None:
            return 0
        return len(holder.cache.named) + len(holder.tiers.named) + len(holder.assumed)

    def has_events(self, endpoint: str) -> bool:
        """Return whether what the endpoint holds is known from its events."""
        holder = self._holders.get(endpoint)
        return holder is not None and holder.has_events

    # ---- news

    def assume(self, endpoint: str, prefix: Sequence[int]) -> None:
        """The endpoint was sent a prompt that begins with these blocks."""
        holder = self._holder(endpoint)
        bit, blocks, assumed = holder.cache.bit, self._blocks, holder.assumed
        # Backwards: of one prefix the last blocks go first, as in the engine.
        for block in reversed(prefix):
            held = blocks.pop(block, 0)
            if not held & bit or block in assumed:
                assumed.pop(block, None)
                assumed[block] = None
            blocks[block] = self._set(held | bit)
        self._trim(holder)
        self._evict()

    def correct(
        self, endpoint: str, prefix: Sequence[int], expected: int, reported: int | None
    ) -> None:
        """The response to an assumed prompt ended.

        Args:
            endpoint: Who answered.
            prefix: The blocks that were assumed.
            expected: Leading blocks that it was believed to hold when it was chosen.
            reported: Leading blocks that it says it held; None if it did not say.
        """
        if reported is not None:
            self.num_checked += 1
            # An engine computes the block of a prompt's last token, though it may hold it.
            self.num_off += abs(expected - reported) > 1
        holder = self._holders.get(endpoint)
        if holder is None:
            return
        if holder.has_events:
            # It has had time to say what it stored; what it was known to have is no assumption.
            untold = prefix[max(expected, reported or 0) :]
            self._unassume(holder, [block for block in untold if block in holder.assumed])
        elif reported is not None:
            self._learn_capacity(holder, len(prefix), expected, reported)

    def _unassume(self, holder: _Holder, blocks: Sequence[int]) -> None:
        """An endpoint with events did not tell of blocks that it should have stored."""
        holder.num_unheard += bool(blocks)
        if holder.is_silent:
            return
        for block in blocks:
            del holder.assumed[block]
            self._clear(block, holder.cache.bit)

    def _learn_capacity(
        self, holder: _Holder, num_blocks: int, expected: int, reported: int
    ) -> None:
        size = len(holder.assumed)
        if reported + 1 < expected:
            # It evicted what it was believed to hold: it has less room, for this prompt at least.
            room = max(num_blocks, 1, int(size * CAPACITY_DECAY))
            holder.blocks_max = min(self.blocks_max, room)
            self._trim(holder)
        elif size >= holder.blocks_max:
            grown = int(holder.blocks_max * CAPACITY_GROWTH) + 1
            holder.blocks_max = min(self.blocks_max, grown)

    def apply(self, endpoint: str, event: BlockEvent) -> None:
        """The endpoint said what it stored or removed."""
        holder = self._holder(endpoint)
        holder.has_events = True
        holder.num_unheard = 0
        num_in_tiers = len(holder.tiers.named)
        match event:
            case AllBlocksCleared():
                self._empty(holder)
            case BlockStored() | BlockRemoved() if event.group_idx not in (None, 0):
                # Groups of a hybrid model are stored together; the first one stands for all.
                pass
            case BlockStored():
                self._store(holder, event)
            case BlockRemoved():
                medium = _medium(holder, event.medium)
                gone, _ = medium.named.remove(map(number_in, event.block_hashes))
                self._forget(holder, medium, gone)
        self._num_in_tiers += len(holder.tiers.named) - num_in_tiers

    def _store(self, holder: _Holder, event: BlockStored) -> None:
        num_blocks = len(event.block_hashes)
        if (
            event.block_tokens != self.block_tokens
            or len(event.token_ids) != num_blocks * event.block_tokens
        ):
            self.num_refused += 1
            self._complain(event.block_tokens)
            return
        parent = self._parent(holder, event)
        if parent is None:
            self.num_orphans += 1
            return
        hashes = token_hashes(event.token_ids, event.block_tokens, parent, extra_key_bytes(event))
        if event.medium == POOL_MEDIUM:
            self.pools.name(event.block_hashes, hashes)
            return
        medium = _medium(holder, event.medium)
        names = [number_in(each) for each in event.block_hashes]
        gone = medium.named.store(names, hashes)
        if gone:
            self._forget(holder, medium, gone)
            # One event may name two blocks alike: what it took back itself is not held.
            named = zip(names, hashes, strict=True)
            hashes = [block for name, block in named if medium.named.block_of(name) == block]
        for block in hashes:
            if medium is holder.cache:
                holder.assumed.pop(block, None)
            self._blocks[block] = self._set(self._blocks.get(block, 0) | medium.bit)
        self._forget(holder, medium, medium.named.forget_oldest(self.blocks_max))
        self._evict()

    def _complain(self, block_tokens: int) -> None:
        if block_tokens != self.block_tokens and block_tokens != self.refused_block_tokens:
            self.refused_block_tokens = block_tokens
            log.warning(
                "an engine's blocks have %d tokens: set block_tokens, which is %d",
                block_tokens,
                self.block_tokens,
            )

    def _parent(self, holder: _Holder, event: BlockStored) -> int | None:
        if event.parent_block_hash is None:
            return token_root(event.lora_name)
        if event.medium == POOL_MEDIUM:
            return self.pools.block_of(event.parent_block_hash)
        parent = number_in(event.parent_block_hash)
        found = holder.cache.named.block_of(parent)
        return holder.tiers.named.block_of(parent) if found is None else found

    def _forget(self, holder: _Holder, medium: _Medium, blocks: Sequence[int]) -> None:
        for block in blocks:
            if medium is not holder.cache or block not in holder.assumed:
                self._clear(block, medium.bit)

    def drop(self, endpoint: str) -> None:
        """Forget everything about an endpoint: it left, restarted, or events of it were lost."""
        holder = self._holders.pop(endpoint, None)
        if holder is not None:
            self._num_in_tiers -= len(holder.tiers.named)
            self._empty(holder)
            del self._by_slot[holder.slot]
        if not self._blocks:
            # A dict that was emptied entry by entry keeps its size.
            self._blocks, self._sets = {}, {}

    # ---- book-keeping

    def _holder(self, endpoint: str) -> _Holder:
        holder = self._holders.get(endpoint)
        if holder is None:
            slot = next(slot for slot in range(len(self._by_slot) + 1) if slot not in self._by_slot)
            holder = self._holders[endpoint] = _Holder(slot, self.blocks_max)
            self._by_slot[slot] = holder
        return holder

    def _set(self, held: int) -> int:
        if held < 256:
            return held
        found = self._sets.get(held)
        if found is None:
            if len(self._sets) > self.blocks_max:
                self._sets.clear()
            found = self._sets[held] = held
        return found

    def _clear(self, block: int, bit: int) -> None:
        held = self._blocks.get(block, 0) & ~bit
        if held:
            self._blocks[block] = self._set(held)
        else:
            self._blocks.pop(block, None)

    def _empty(self, holder: _Holder) -> None:
        for medium in (holder.cache, holder.tiers):
            for block in medium.named.clear():
                self._clear(block, medium.bit)
        for block in holder.assumed:
            self._clear(block, holder.cache.bit)
        holder.assumed = {}

    def _trim(self, holder: _Holder) -> None:
        for block in oldest(holder.assumed, holder.blocks_max):
            del holder.assumed[block]
            self._clear(block, holder.cache.bit)

    def _evict(self) -> None:
        for block in oldest(self._blocks, self.blocks_max):
            held = self._blocks.pop(block)
            self.num_evicted += 1
            for slot in _slots(held):
                # What the engine called it stays until the engine removes it, or room runs out.
                self._by_slot[slot].assumed.pop(block, None)

    def check(self) -> None:
        """Raise AssertionError if the tables do not agree."""
        assert len(self._blocks) <= self.blocks_max
        self.pools.check()
        in_tiers = [len(holder.tiers.named) for holder in self._by_slot.values()]
        assert self._num_in_tiers == sum(in_tiers)
        for slot, holder in self._by_slot.items():
            assert holder.slot == slot
            assert len(holder.assumed) <= holder.blocks_max <= self.blocks_max
            for block in holder.assumed:
                assert self._blocks[block] & holder.cache.bit
            for medium in (holder.cache, holder.tiers):
                assert len(medium.named) <= self.blocks_max
                medium.named.check()
        for block, held in self._blocks.items():
            assert 0 <= block <= HASH_MASK
            assert held
            assert all(slot in self._by_slot for slot in _slots(held))


def _note(depths: dict[int, int], bits: int, depth: int) -> None:
    """Note for each of the bits how deep its endpoint went."""
    while bits:
        bit = bits & -bits
        depths[bit] = depth
        bits ^= bit


def _slots(held: int) -> Iterator[int]:
    while held:
        bit = held & -held
        held ^= bit
        yield (bit.bit_length() - 1) // 2


def _medium(holder: _Holder, medium: str | None) -> _Medium:
    return holder.cache if medium in (None, ENGINE_MEDIUM) else holder.tiers
