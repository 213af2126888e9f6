"""Cartridges cut into another cache's chunks, some of them in memory; needs neither it nor torch.

A chunk is a fixed number of tokens, and is found by a hash of all tokens up to its end. So a
cartridge whose tokens' ids are known has the chunks that the text itself would have, and answers
for them; behind its last whole chunk the text is computed.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.cartridges.contents import Contents
from kvkeep.cartridges.file_format import read_cartridge
from kvkeep.cartridges.manifest import Expected, check_expected
from kvkeep.cartridges.registry import Entry, Registry
from kvkeep.cartridges.residency.resident_set import ResidencyMetrics, ResidentSet
from kvkeep.model.errors import InputError, KvkeepError, RefusedError

log = logging.getLogger(__name__)

COMPLAINTS_MAX = 1024
"""Different ones that are remembered, so that each is logged once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What a rank of an engine needs of a cartridge."""

    expected: Expected
    """Of the whole model, all ranks together."""
    chunk_tokens: int
    rank: int = 0
    num_ranks: int = 1

    @property
    def heads(self) -> slice:
        """Of a cartridge's heads, those of this rank.

        Raises:
            InputError: They can't be divided.
        """
        num_heads = self.expected.num_heads
        assert num_heads is not None
        if num_heads % self.num_ranks:
            raise InputError(
                f"{num_heads} heads can't be divided among {self.num_ranks} ranks: choose another "
                "tensor-parallel size"
            )
        share = num_heads // self.num_ranks
        return slice(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True, eq=False)
class _Shelved:
    digest: str
    chunk_idx_of: dict[int, int]
    """From a chunk's hash to its place."""
    chunks: list[npt.NDArray[Any]]
    """Bits, ``[2, layers, chunk_tokens, heads * dim]`` each: keys, then values."""
    references: list[int]
    """One for each pin of a chunk."""


class Shelf:
    """The cartridges of a registry, as chunks of one rank. For any number of threads."""

    def __init__(
        self,
        folder: Path,
        geometry: Geometry,
        hash_chunks: Callable[[list[int]], Sequence[int]],
        *,
        bytes_max: int,
        trusted: Sequence[bytes] = (),
    ) -> None:
        """Hold nothing: a cartridge is read when it is asked for.

        Args:
            folder: The registry's.
            geometry: What cartridges have to be.
            hash_chunks: Hashes of the whole chunks of a list of token ids, first to last.
            bytes_max: Of memory for chunks.
            trusted: Public keys, one of which has to have signed a cartridge; none: it need not.

        Raises:
            InputError: The registry can't be opened, or the geometry is none.
        """
        self._heads = geometry.heads
        self._geometry, self._hash_chunks, self._trusted = geometry, hash_chunks, trusted
        self._registry = Registry(folder)
        self._resident = ResidentSet(bytes_max)
        self._shelved: dict[str, _Shelved] = {}
        self._complaints: set[str] = set()
        self._lock = threading.Lock()
        self._is_open = True

    @property
    def metrics(self) -> ResidencyMetrics:
        """What was counted."""
        return self._resident.metrics

    def close(self) -> None:
        """Answer for nothing more, and give the memory back. May be called again."""
        with self._lock:
            self._is_open = False
            self._shelved.clear()
            self._registry.close()

    # ---- Chunks

    def has(self, cartridge_id: str, chunk_hash: int) -> bool:
        """Whether a cartridge has a chunk; it is read if it is not in memory."""
        with self._lock:
            shelved = self._find(cartridge_id)
            return shelved is not None and chunk_hash in shelved.chunk_idx_of

    def read(self, cartridge_id: str, chunk_hash: int) -> npt.NDArray[Any] | None:
        """A chunk's bits, ``[2, layers, chunk_tokens, heads * dim]``; None if there is none.

        They stay as they are, also when their cartridge leaves the memory.
        """
        with self._lock:
            shelved = self._find(cartridge_id)
            if shelved is None:
                return None
            chunk_idx = shelved.chunk_idx_of.get(chunk_hash)
            return None if chunk_idx is None else shelved.chunks[chunk_idx]

    def pin(self, cartridge_id: str, chunk_hash: int) -> bool:
        """Keep a cartridge in memory, for one of its chunks; False if there is none."""
        with self._lock:
            shelved = self._find(cartridge_id)
            if shelved is None or chunk_hash not in shelved.chunk_idx_of:
                return False
            reference = self._resident.acquire(cartridge_id, 0).reference
            shelved.references.append(reference)
            return True

    def unpin(self, cartridge_id: str, chunk_hash: int) -> bool:
        """Undo one pin; False if there was none."""
        with self._lock:
            shelved = self._shelved.get(cartridge_id)
            if shelved is None or not shelved.references:
                return False
            return self._resident.release(cartridge_id, shelved.references.pop())

    def drop(self, cartridge_id: str, *, force: bool) -> bool:
        """Take a cartridge out of memory; its file stays. False if it is not there, or pinned."""
        with self._lock:
            if not self._resident.evict(cartridge_id, force=force):
                return False
            del self._shelved[cartridge_id]
            return True

    # ---- Reading

    def _find(self, cartridge_id: str) -> _Shelved | None:
        """A cartridge in memory; what is wrong with it is logged, and it is as good as absent."""
        if not self._is_open:
            return None
        try:
            return self._find_or_read(cartridge_id)
        except KvkeepError as error:
            sentence = str(error)
            if sentence not in self._complaints and len(self._complaints) < COMPLAINTS_MAX:
                self._complaints.add(sentence)
                log.warning("%s", sentence)
            return None

    def _find_or_read(self, cartridge_id: str) -> _Shelved | None:
        entry = self._registry.get(cartridge_id)
        shelved = self._shelved.get(cartridge_id)
        if shelved is not None and (entry is None or entry.digest != shelved.digest):
            # Another took its place: who uses the old one has its own memory.
            self._resident.evict(cartridge_id, force=True)
            del self._shelved[cartridge_id]
            shelved = None
        if entry is None:
            raise InputError(
                f"there is no cartridge {cartridge_id!r}: see kvkeep cartridge ls, and register it"
            )
        if shelved is None:
            shelved = self._read_into_memory(entry)
        else:
            self._resident.release(cartridge_id, self._resident.acquire(cartridge_id, 0).reference)
        return shelved

    def _read_into_memory(self, entry: Entry) -> _Shelved:
        geometry, name = self._geometry, entry.cartridge_id
        # What can be said without the file is said before others leave for it.
        check_expected(entry.manifest, geometry.expected)
        if not entry.manifest.has_token_ids:
            raise RefusedError(
                f"cartridge {name} knows no token ids, so it has no chunks that a text could have"
            )
        num_chunks = entry.manifest.num_tokens // geometry.chunk_tokens
        num_bytes = entry.manifest.kv_bytes // entry.manifest.num_tokens // geometry.num_ranks
        acquired = self._resident.acquire(name, num_bytes * num_chunks * geometry.chunk_tokens)
        for evicted in acquired.evicted:
            del self._shelved[evicted]
        try:
            cartridge = read_cartridge(
                entry.path, expected=geometry.expected, trusted=self._trusted
            )
            ids = cartridge.contents.token_ids
            assert ids is not None
            hashes = self._hash_chunks(ids.tolist())[:num_chunks]
            chunks = [self._cut(cartridge.contents, idx) for idx in range(num_chunks)]
        except BaseException:
            self._resident.failed(name)
            raise
        self._resident.loaded(name)
        self._resident.release(name, acquired.reference)
        places = {chunk_hash: idx for idx, chunk_hash in enumerate(hashes)}
        shelved = self._shelved[name] = _Shelved(entry.digest, places, chunks, [])
        return shelved

    def _cut(self, contents: Contents, chunk_idx: int) -> npt.NDArray[Any]:
        size = self._geometry.chunk_tokens
        tokens = slice(chunk_idx * size, (chunk_idx + 1) * size)
        parts = [
            [layer[kv].bits()[tokens, self._heads].reshape(size, -1) for layer in contents.layers]
            for kv in (0, 1)
        ]
        return np.array(parts)
