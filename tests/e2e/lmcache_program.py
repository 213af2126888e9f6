"""What LMCache itself does with the plug-in: run by the interpreter of LMCache's environment.

Arguments: the registry's folder. Says on stdout, as JSON, what LMCache found and loaded.
"""

import json
import sys
from pathlib import Path

import torch
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.event_manager import EventManager
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.storage_manager import StorageManager
from lmcache.v1.token_database import ChunkedTokenDatabase

from kvkeep.cartridges.registry import Registry

CHUNK = 16
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 8
TAGGED = {"lmcache.tag.kvkeep_cartridge": "ships"}


def make_config(folder: str) -> LMCacheEngineConfig:
    """LMCache's configuration, as its file would say it."""
    return LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK,
        local_cpu=True,
        max_local_cpu_size=0.05,
        storage_plugins=["kvkeep"],
        extra_config={
            "storage_plugin.kvkeep.module_path": "kvkeep.adapters.lmcache_plugin",
            "storage_plugin.kvkeep.class_name": "CartridgePlugin",
            "kvkeep.library": folder,
        },
    )


def main() -> None:
    """Ask as an engine's worker asks."""
    folder = sys.argv[1]
    with Registry(Path(folder)) as registry:
        contents = registry.load("ships").contents
    config = make_config(folder)
    metadata = LMCacheMetadata(
        model_name="tiny", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
        kv_dtype=torch.float32, kv_shape=(NUM_LAYERS, 2, CHUNK, NUM_HEADS, HEAD_DIM),
        chunk_size=CHUNK, role="worker",
    )  # fmt: skip
    database = ChunkedTokenDatabase(config, metadata)
    manager = StorageManager(config, metadata, EventManager())
    assert contents.token_ids is not None
    prompt = [*contents.token_ids.tolist(), 1, 2, 3]
    tagged = [key for _, _, key in database.process_tokens(prompt, request_configs=TAGGED)]
    plain = [key for _, _, key in database.process_tokens(prompt)]
    found = {
        "backends": list(manager.storage_backends),
        "keys": len(tagged),
        "plain": manager.batched_contains(plain)[0],
        "tagged": manager.batched_contains(tagged, pin=True)[0],
    }
    mapped = manager.batched_contains(tagged)[1]
    chunks = manager.batched_get(mapped["kvkeep"], location="kvkeep")
    wanted = [
        [torch.from_numpy(layer[part].numpy().copy()) for layer in contents.layers]
        for part in (0, 1)
    ]
    found["equal"] = [
        torch.equal(
            chunk.tensor[part, layer],
            wanted[part][layer][idx * CHUNK : (idx + 1) * CHUNK].reshape(CHUNK, -1),
        )
        for idx, chunk in enumerate(chunks)
        for part in (0, 1)
        for layer in range(NUM_LAYERS)
    ]
    # LMCache keeps what it loaded in its own memory, under the same keys.
    found["again"] = {name: len(keys) for name, keys in manager.batched_contains(tagged)[1].items()}
    found["plain_after"] = manager.batched_contains(plain)[0]
    print(json.dumps(found))
    sys.stdout.flush()
    manager.close()


if __name__ == "__main__":
    main()
