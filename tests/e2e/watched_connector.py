"""kvkeep's connector, watched: a rank notes which bytes it stores and which it holds after loads.

What is noted comes from the tensors as vLLM registered them, by vLLM's own rank, and not from
kvkeep's map of their pages: a page in a wrong place is in a wrong place here.
"""

import os
from pathlib import Path
from typing import Any

import torch
import xxhash

from kvkeep.connector.metadata import StepMetadata
from kvkeep.connector.plugin import KvkeepConnector
from kvkeep.protocol.codec import split_hashes
from tests.e2e.kv_notes import FOLDER_VARIABLE, What, note_of


class WatchedConnector(KvkeepConnector):
    """Does what kvkeep's does, and takes notes."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Remember the tensors."""
        super().register_kv_caches(kv_caches)
        self._layers = list(kv_caches.values())
        path = Path(os.environ[FOLDER_VARIABLE]) / f"{os.getpid()}.jsonl"
        self._notes = path.open("a", buffering=1)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Urgent stores are handed out here: their blocks are computed."""
        self._note_stores(kv_connector_metadata)
        super().handle_preemptions(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **more: Any) -> None:
        """On CPUs loads are over when this returns, and the others' stores are handed out."""
        metadata = self._get_connector_metadata()
        self._note_stores(metadata)
        super().start_load_kv(forward_context, **more)
        if isinstance(metadata, StepMetadata):
            for job in metadata.loads:
                self._note("loaded", job.hashes, job.block_ids)

    def wait_for_save(self) -> None:
        """What is left of the stores."""
        self._note_stores(self._get_connector_metadata())
        super().wait_for_save()

    def _note_stores(self, metadata: Any) -> None:
        if isinstance(metadata, StepMetadata):
            for job in metadata.stores:
                self._note("stored", job.hashes, job.block_ids)

    def _note(self, what: What, hashes: bytes, block_ids: tuple[int, ...]) -> None:
        rank = self._config.parallel_config.rank
        for block_hash, block_id in zip(split_hashes(hashes), block_ids, strict=True):
            pages = [_digests(layer[block_id]) for layer in self._layers]
            self._notes.write(note_of(what, rank, block_hash.hex(), pages))

    def shutdown(self) -> None:
        """Close the notes too."""
        super().shutdown()
        if hasattr(self, "_notes"):
            self._notes.close()


def _digests(heads: torch.Tensor) -> list[str]:
    """Of the bytes of each head of one layer of one block: ``[heads, tokens, content]``."""
    pages = heads.contiguous().view(torch.uint8).numpy()
    return [xxhash.xxh3_128_hexdigest(page.tobytes()) for page in pages]
