"""Cartridges for engines that run LMCache: one of its storage plug-ins.

LMCache's configuration names it; nothing of LMCache is changed:

    chunk_size: 256
    storage_plugins: ["kvkeep"]
    extra_config:
      storage_plugin.kvkeep.module_path: kvkeep.adapters.lmcache_plugin
      storage_plugin.kvkeep.class_name: CartridgePlugin
      kvkeep.library: /var/lib/kvkeep/cartridges

A request names a cartridge with a tag, which LMCache puts into its keys and keeps apart by:

    "kv_transfer_params": {"lmcache.tag.kvkeep_cartridge": "ships"}

Keys without that tag are never answered, so whoever names no cartridge gets none. The plug-in only
reads. Source: LMCache 0.5.6, lmcache/v1/storage_backend/abstract_backend.py (what a plug-in has to
have) and lmcache/utils.py (tags of a key).
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvkeep.adapters.lmcache_shelf import Geometry, Shelf
from kvkeep.cartridges.manifest import Expected
from kvkeep.cartridges.signing import load_public_key
from kvkeep.model.errors import InputError

TAG = "kvkeep_cartridge"
BYTES_MAX = 4 << 30
"""Of memory for chunks, for each rank, if ``kvkeep.bytes_max`` does not say another."""
OPTIONS = {
    "kvkeep.library": "folder of the registry; has to be said",
    "kvkeep.model": "what cartridges call the model; by default the name that the engine has",
    "kvkeep.bytes_max": "bytes of memory for chunks of cartridges, for each rank",
    "kvkeep.trusted_keys": "files with public keys, one of which has to have signed a cartridge",
}
"""Names in ``extra_config`` to their meaning."""


def _find_base() -> Any:
    """What LMCache's plug-ins inherit; without LMCache nothing, and the module is still there."""
    try:
        module = importlib.import_module("lmcache.v1.storage_backend.abstract_backend")
    except ImportError:
        return object
    return module.StoragePluginInterface


_Base: Any = _find_base()


class CartridgePlugin(_Base):  # type: ignore[misc]
    """Answers for the chunks of cartridges that requests name."""

    def __init__(
        self,
        dst_device: str = "cpu",
        config: Any = None,
        metadata: Any = None,
        local_cpu_backend: Any = None,
        loop: Any = None,
    ) -> None:
        """Open the registry; LMCache calls this.

        Args:
            dst_device: Where engines want KV; chunks are handed out in LMCache's host memory.
            config: LMCache's.
            metadata: What LMCache knows of the engine.
            local_cpu_backend: Who has host memory; None in the scheduler, which only asks.
            loop: Not needed.

        Raises:
            InputError: One sentence; LMCache logs it and goes on without the plug-in.
        """
        if _Base is object:
            self.dst_device, self.config, self.metadata = dst_device, config, metadata
            self.local_cpu_backend, self.loop = local_cpu_backend, loop
        else:
            super().__init__(
                dst_device=dst_device,
                config=config,
                metadata=metadata,
                local_cpu_backend=local_cpu_backend,
                loop=loop,
            )
        self._shelf = _open_shelf(config, metadata)

    # ---- Asking

    def contains(self, key: Any, pin: bool = False) -> bool:
        """Whether a named cartridge has this chunk; reads the cartridge if it has to."""
        cartridge_id = find_cartridge(key)
        if cartridge_id is None:
            return False
        if pin:
            return self._shelf.pin(cartridge_id, key.chunk_hash)
        return self._shelf.has(cartridge_id, key.chunk_hash)

    def batched_contains(self, keys: Sequence[Any], pin: bool = False) -> int:
        """How many leading keys are there."""
        for num_found, key in enumerate(keys):
            if not self.contains(key, pin):
                return num_found
        return len(keys)

    async def batched_async_contains(
        self, lookup_id: str, keys: Sequence[Any], pin: bool = False
    ) -> int:
        """As ``batched_contains``."""
        return self.batched_contains(keys, pin)

    def get_blocking(self, key: Any) -> Any:
        """A chunk in LMCache's memory; None if there is none, or no room for it."""
        cartridge_id = find_cartridge(key)
        if cartridge_id is None or self.local_cpu_backend is None:
            return None
        bits = self._shelf.read(cartridge_id, key.chunk_hash)
        if bits is None:
            return None
        return self._filled(bits)

    def batched_get_blocking(self, keys: Sequence[Any]) -> list[Any]:
        """As ``get_blocking``, for each."""
        return [self.get_blocking(key) for key in keys]

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: Sequence[Any], transfer_spec: Any = None
    ) -> list[Any]:
        """The leading chunks that are there."""
        found: list[Any] = []
        for key in keys:
            chunk = self.get_blocking(key)
            if chunk is None:
                break
            found.append(chunk)
        return found

    def _filled(self, bits: Any) -> Any:
        torch = importlib.import_module("torch")
        memory = importlib.import_module("lmcache.v1.memory_management")
        dtype = self.metadata.kv_dtype
        chunk = self.local_cpu_backend.allocate(
            torch.Size(bits.shape), dtype, memory.MemoryFormat.KV_2LTD
        )
        if chunk is not None:
            # Signed integers of the same bits: torch has them of every size.
            whole = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
            chunk.tensor.copy_(whole.view(dtype))
        return chunk

    # ---- Keeping

    def pin(self, key: Any) -> bool:
        """Keep a chunk's cartridge in memory."""
        return self.contains(key, pin=True)

    def unpin(self, key: Any) -> bool:
        """Undo ``pin``."""
        cartridge_id = find_cartridge(key)
        return cartridge_id is not None and self._shelf.unpin(cartridge_id, key.chunk_hash)

    def remove(self, key: Any, force: bool = True) -> bool:
        """Take a chunk's whole cartridge out of memory; its file stays where it is."""
        cartridge_id = find_cartridge(key)
        return cartridge_id is not None and self._shelf.drop(cartridge_id, force=force)

    def batched_remove(self, keys: Sequence[Any], force: bool = True) -> int:
        """As ``remove``, for each; how many were there."""
        return sum(self.remove(key, force) for key in keys)

    def touch_cache(self) -> None:
        """Uses are noted as they happen."""

    # ---- Never written

    def exists_in_put_tasks(self, key: Any) -> bool:
        """Nothing is ever on its way here."""
        return False

    def batched_submit_put_task(
        self,
        keys: Sequence[Any],
        objs: Sequence[Any],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> None:
        """Cartridges are made elsewhere: nothing is stored."""

    async def async_batched_submit_put_task(
        self,
        keys: Sequence[Any],
        objs: Sequence[Any],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> None:
        """As ``batched_submit_put_task``."""

    # ---- The rest

    def get_allocator_backend(self) -> Any:
        """Whose memory chunks are handed out in."""
        return self.local_cpu_backend

    def cancel_request(self, req_id: str) -> None:
        """Nothing is remembered of requests."""

    def close(self) -> None:
        """Answer for nothing more."""
        self._shelf.close()


def find_cartridge(key: Any) -> str | None:
    """The cartridge that a key of LMCache names with a tag; None if it names none."""
    for tag in getattr(key, "tags", None) or ():
        if isinstance(tag, tuple | list) and len(tag) == 2 and tag[0] == TAG:
            return str(tag[1])
    return None


def _open_shelf(config: Any, metadata: Any) -> Shelf:
    if config is None or metadata is None:
        raise InputError("the plug-in needs LMCache's configuration: let LMCache make it")
    told: Mapping[str, Any] = config.extra_config or {}
    odd = sorted(name for name in told if name.startswith("kvkeep.") and name not in OPTIONS)
    if odd:
        raise InputError(f"extra_config has no {', '.join(odd)}: choose from {', '.join(OPTIONS)}")
    if not told.get("kvkeep.library"):
        raise InputError("extra_config names no kvkeep.library: name the registry's folder")
    if getattr(config, "use_layerwise", False) or getattr(config, "enable_blending", False):
        raise InputError("cartridges come whole: leave use_layerwise and enable_blending out")
    bytes_max = told.get("kvkeep.bytes_max", BYTES_MAX)
    if not isinstance(bytes_max, int) or isinstance(bytes_max, bool) or bytes_max < 0:
        raise InputError(f"kvkeep.bytes_max must be a number of bytes, not {bytes_max!r}")
    keys = told.get("kvkeep.trusted_keys") or []
    listed = [keys] if isinstance(keys, str) else keys
    return Shelf(
        Path(told["kvkeep.library"]),
        geometry_of(config, metadata, told.get("kvkeep.model")),
        _Hashes(config, metadata),
        bytes_max=bytes_max,
        trusted=[load_public_key(Path(key)) for key in listed],
    )


def geometry_of(config: Any, metadata: Any, model: str | None = None) -> Geometry:
    """What LMCache says of the engine.

    Raises:
        InputError: It has KV that a cartridge can't hold.
    """
    if metadata.use_mla:
        raise InputError("the model keeps latent KV (MLA), which cartridges don't hold")
    num_layers, _, _, num_heads, head_dim = metadata.kv_shape
    expected = Expected(
        model=model or metadata.model_name,
        num_layers=num_layers,
        num_heads=num_heads * metadata.world_size,
        head_dim=head_dim,
        dtype=str(metadata.kv_dtype).removeprefix("torch."),
    )
    return Geometry(
        expected=expected,
        chunk_tokens=config.chunk_size,
        rank=metadata.worker_id,
        num_ranks=metadata.world_size,
    )


class _Hashes:
    """Hashes of chunks as LMCache itself has them, in this process."""

    def __init__(self, config: Any, metadata: Any) -> None:
        self._config, self._metadata = config, metadata
        self._database: Any = None

    def __call__(self, token_ids: list[int]) -> list[int]:
        if self._database is None:
            self._database = self._make()
        found = self._database.process_tokens(tokens=token_ids, make_key=False)
        size = self._config.chunk_size
        return [chunk_hash for begin, end, chunk_hash in found if end - begin == size]

    def _make(self) -> Any:
        """LMCache's own, made without its side effect.

        Making one sets what hashes begin with anew, for LMCache and for vLLM's own prefix cache:
        whatever both hold already would not be found any more.
        """
        module = importlib.import_module("lmcache.v1.token_database")
        holders = [module, sys.modules.get("vllm.v1.core.kv_cache_utils")]
        names = [vars(holder) for holder in holders if holder is not None]
        before = [(each, each["NONE_HASH"]) for each in names if "NONE_HASH" in each]
        try:
            return module.ChunkedTokenDatabase(self._config, self._metadata)
        finally:
            for each, none_hash in before:
                each["NONE_HASH"] = none_hash
