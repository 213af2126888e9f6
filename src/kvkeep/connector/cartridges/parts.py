"""What an engine's halves need to serve cartridges, made from its configuration."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvkeep.cartridges.manifest import Expected, identity_of
from kvkeep.cartridges.signing import load_public_key
from kvkeep.cartridges.store.library import Library
from kvkeep.connector import compat
from kvkeep.connector.cartridges.depositor import Bench, Depositor
from kvkeep.connector.settings import ConnectorSettings
from kvkeep.connector.worker.attachment import Attachment
from kvkeep.connector.worker.stores import CALL_TIMEOUT_S, Batches
from kvkeep.model.clock import Clock
from kvkeep.protocol.messages import IdentityPart

SCRATCH_BLOCKS = 16
"""Made at once: some 10 MiB of a small model, 60 MiB of one with 8 KV heads in 48 layers."""


def model_names(vllm_config: Any) -> Sequence[str]:
    """Names under which a cartridge may call this engine's model."""
    model = vllm_config.model_config
    served = getattr(model, "served_model_name", None) or []
    served = [served] if isinstance(served, str) else list(served)
    return [str(model.model), Path(str(model.model)).name, *served]


def make_library(
    vllm_config: Any,
    kv_cache_config: Any,
    settings: ConnectorSettings,
    words: list[IdentityPart],
) -> Library:
    """The cartridges that this engine may serve.

    Args:
        vllm_config: The engine's.
        kv_cache_config: The engine's.
        settings: Of the connector.
        words: What its namespace is made of.
    """
    group = kv_cache_config.kv_cache_groups[0]
    expected = Expected(
        model=str(vllm_config.model_config.model),
        num_layers=len(group.layer_names),
        num_heads=compat.total_kv_heads(vllm_config),
        head_dim=int(group.kv_cache_spec.head_size),
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        block_tokens=int(group.kv_cache_spec.block_size),
        identity=identity_of(words),
    )
    keys = [Path(name).expanduser() for name in settings.cartridge_keys]
    return Library(
        settings.library_folder,
        lambda: expected,
        models=model_names(vllm_config),
        trusted=lambda: [load_public_key(path) for path in keys],
    )


def make_depositor(
    attachment: Attachment,
    memory: Any,
    make_mover: Callable[[Any], Any],
    *,
    layers: Mapping[str, Any],
    clock: Clock,
    settings: ConnectorSettings,
) -> Depositor:
    """What brings cartridges to the pool from one rank.

    Args:
        attachment: Of the rank.
        memory: Its engine's blocks: how they lie.
        make_mover: Makes what copies blocks of such memory.
        layers: The engine's attention layers, in the model's order.
        clock: Monotonic.
        settings: Of the connector.
    """

    def make_bench() -> Bench:
        # Not before it is needed: torch's tensors, and the GPU's memory.
        from kvkeep.connector.cartridges.scratch import Scratch

        scratch = Scratch(memory, layers, SCRATCH_BLOCKS)
        mover = make_mover(scratch.memory)
        batches = Batches(
            attachment,
            mover,
            scratch.memory,
            clock,
            lease_s=settings.lease_s,
            timeout_s=max(CALL_TIMEOUT_S, settings.patience_ms / 1e3),
        )
        return Bench(scratch, batches, mover.snapshot)

    return Depositor(attachment, make_bench)
