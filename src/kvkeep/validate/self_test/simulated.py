"""A stand without an engine: a real pool file, real copies and digests, and a small model.

Loads do what a connector's worker does: digests are taken and headers compared first, then pages
are copied and checked; a block that is refused is computed and stored again.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np

from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import BlockKey, Namespace
from kvkeep.model.layout import derive_namespace
from kvkeep.tiers.shared_memory import PoolFile
from kvkeep.tiers.slot_header import DIGEST_BYTES, SlotState
from kvkeep.transfer.base import Addresses
from kvkeep.transfer.host_copy import addresses, open_copier
from kvkeep.validate.answer import Answer
from kvkeep.validate.self_test.faults import Block
from kvkeep.validate.self_test.planting import PlantedPool
from kvkeep.validate.self_test.score import Replay
from kvkeep.validate.self_test.small_model import BLOCK_TOKENS, LAYOUT, VOCABULARY, SmallModel
from kvkeep.validate.verdict import judge

POOL_BYTES = 4 << 20
BLOCKS_PER_PROMPT = 5
HELD_OUT_AT_ONCE = 40


class SimulatedStand:
    """Prompts of random tokens, stored once; see `Stand`."""

    name = "simulated"
    is_exact = True
    num_floor_prompts = 0

    def __init__(self, file: PoolFile, num_prompts: int, seed: int) -> None:
        self._file = file
        file.format(LAYOUT)
        self._view = file.view()
        self._pool = PlantedPool(self._view)
        self._copier = open_copier()
        self._model = SmallModel()
        chance = Random(seed)
        self._tokens = [_random_tokens(chance) for _ in range(num_prompts)]
        self._held_out = Random(~seed)
        tenants = [derive_namespace(LAYOUT, {}, name) for name in ("a", "b")]
        self._tenant, others = tenants[0], _random_tokens(chance)
        self.prompts = [_keys(tenants[0], tokens) for tokens in self._tokens]
        self.foreign = _keys(tenants[1], others)
        self._slots: dict[BlockKey, int] = {}
        self._store(self.foreign, self._model.compute(others))
        self._computed = [self._compute(idx) for idx in range(num_prompts)]

    @staticmethod
    @contextlib.contextmanager
    def opened(num_prompts: int, seed: int) -> Iterator["SimulatedStand"]:
        """A stand on a pool file that has no name: nothing of it is left, however this ends."""
        with tempfile.TemporaryDirectory(prefix="kvkeep-self-test-") as folder:
            file = PoolFile.open(Path(folder) / "pool", POOL_BYTES)
        stand = SimulatedStand(file, num_prompts, seed)
        try:
            yield stand
        finally:
            # Windows keep the mapping open.
            del stand._view, stand._pool
            file.close()

    async def settle(self) -> PlantedPool:
        """Nothing is moved between two calls, and the model keeps nothing."""
        return self._pool

    async def ask_again(self) -> Replay:
        """Load, compute what was refused, and answer."""
        judgements, num_refused = [], 0
        for idx, (tokens, keys) in enumerate(zip(self._tokens, self.prompts, strict=True)):
            arrived = self._load(keys)
            refused = [at for at, block in enumerate(arrived) if block is None]
            num_refused += len(refused)
            if refused:
                right = self._model.compute(tokens)
                self._store([keys[at] for at in refused], [right[at] for at in refused])
                arrived = [
                    right[at] if block is None else block for at, block in enumerate(arrived)
                ]
            blocks = [block for block in arrived if block is not None]
            answer = self._model.answer(tokens, blocks)
            judgements.append(judge(self._computed[idx], answer, exact=True))
        return Replay(tuple(judgements), num_refused, is_whole=True)

    async def ask_held_out(self, num: int) -> Replay:
        """Prompts that were made for this alone."""
        judgements, is_whole = [], True
        for _ in range(min(num, HELD_OUT_AT_ONCE)):
            tokens = _random_tokens(self._held_out)
            computed, keys = self._model.compute(tokens), _keys(self._tenant, tokens)
            self._store(keys, computed)
            loaded = [block for block in self._load(keys) if block is not None]
            is_whole &= len(loaded) == len(computed)
            answers = [self._model.answer(tokens, blocks) for blocks in (computed, loaded)]
            judgements.append(judge(*answers, exact=True))
            # Their slots, the last ones, are the next prompt's.
            for key in keys:
                del self._slots[key]
        return Replay(tuple(judgements), 0, is_whole)

    def _compute(self, idx: int) -> Answer:
        blocks = self._model.compute(self._tokens[idx])
        self._store(self.prompts[idx], blocks)
        return self._model.answer(self._tokens[idx], blocks)

    def _store(self, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> None:
        for key, block in zip(keys, blocks, strict=True):
            slot = self._slots.setdefault(key, len(self._slots))
            source = np.ascontiguousarray(block)
            digests = np.empty((LAYOUT.num_pages, DIGEST_BYTES), dtype=np.uint8)
            self._copier.store(_pages(source), self._places(slot), LAYOUT.page_bytes, digests)
            self._view.digests[slot] = digests.reshape(self._view.digests[slot].shape)
            self._file.mark(slot, SlotState.READY, key)

    def _load(self, keys: Sequence[BlockKey]) -> list[Block | None]:
        """Each block as it arrived; None: it was refused."""
        slots = np.array([self._slots[key] for key in keys], dtype=np.int64)
        digests = self._view.digests[slots].copy()
        hashes = [key.block_hash for key in keys]
        readable = self._view.readable(slots, keys[0].namespace, 0, hashes)
        found: list[Block | None] = []
        for at, slot in enumerate(slots.tolist()):
            target = np.zeros((LAYOUT.num_layers, LAYOUT.num_heads, LAYOUT.page_bytes), np.uint8)
            ok = np.zeros(LAYOUT.num_pages, dtype=np.bool_)
            if readable[at]:
                wanted = np.ascontiguousarray(digests[at]).reshape(-1, DIGEST_BYTES)
                self._copier.load(self._places(slot), _pages(target), LAYOUT.page_bytes, wanted, ok)
            found.append(target if ok.all() else None)
        return found

    def _places(self, slot: int) -> Addresses:
        wanted = np.array([slot], dtype=np.int64)
        return self._view.page_addresses(wanted, 0, LAYOUT.num_heads).reshape(-1)


def _pages(block: Block) -> Addresses:
    """Where an own block's pages lie."""
    layer_bytes = LAYOUT.num_heads * LAYOUT.page_bytes
    layers = np.arange(LAYOUT.num_layers, dtype=np.uint64) * np.uint64(layer_bytes)
    found = addresses(
        layers + np.uint64(block.ctypes.data),
        block_stride_bytes=0,
        head_stride_bytes=LAYOUT.page_bytes,
        block_ids=[0],
        head_range=range(LAYOUT.num_heads),
    )
    return found.reshape(-1)


def _random_tokens(chance: Random) -> list[int]:
    return [chance.randrange(VOCABULARY) for _ in range(BLOCKS_PER_PROMPT * BLOCK_TOKENS + 3)]


def _keys(namespace: Namespace, token_ids: Sequence[int]) -> list[BlockKey]:
    hashes = BlockHasher(namespace, BLOCK_TOKENS).extend(token_ids)
    return [BlockKey(namespace, found) for found in hashes]
