"""What engines tell about their blocks, read strictly: wrong bytes are an error and nothing else.

The names of the fields are vLLM's, whose wire format this is (vllm/distributed/kv_events.py of 0.26
to 0.33): a batch is an array, each event a map with a tag. Fields that are not listed here are
skipped, for every version adds some.
"""

from typing import Annotated, Any

import msgspec

from kvkeep.router.prefix_hashes import salt_key

EVENT_BLOCKS_MAX = 1 << 16
"""Blocks in one event: a prompt of a million tokens has 65,536 blocks of 16."""
EVENTS_MAX = 1 << 16
BLOCK_TOKENS_MAX = 1 << 16
BATCH_BYTES_MAX = 32 << 20

Hash = int | bytes
"""As the engine made it: 64 bits of its hash, or all of it where it was told so."""
Hashes = Annotated[list[Hash], msgspec.Meta(max_length=EVENT_BLOCKS_MAX)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]

ENGINE_MEDIUM = "GPU"
"""The engine's own cache, also where it computes on a CPU."""


class BlockStored(msgspec.Struct, gc=False, tag=True):
    """Blocks that follow each other in one sequence became readable."""

    block_hashes: Hashes
    token_ids: list[TokenId]
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=BLOCK_TOKENS_MAX)] = msgspec.field(
        name="block_size"
    )
    parent_block_hash: Hash | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, gc=False, tag=True):
    """Blocks are gone."""

    block_hashes: Hashes
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, gc=False, tag=True):
    """All of them are."""


BlockEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """What one step of an engine changed."""

    ts: float
    """Seconds since 1970 by the engine's clock."""
    events: Annotated[list[BlockEvent], msgspec.Meta(max_length=EVENTS_MAX)]
    data_parallel_rank: int | None = None


_DECODER = msgspec.msgpack.Decoder(EventBatch)


def decode_batch(payload: bytes) -> EventBatch:
    """Read a batch.

    Raises:
        ValueError: It is not one, or larger than ``BATCH_BYTES_MAX``.
    """
    if len(payload) > BATCH_BYTES_MAX:
        raise ValueError(f"a batch of events is too large. bytes={len(payload)}")
    try:
        # A hostile nesting ends as RecursionError; msgspec's own errors are ValueErrors.
        return _DECODER.decode(payload)
    except RecursionError as error:
        raise ValueError("a batch of events is nested too deep") from error


def extra_key_bytes(event: BlockStored) -> list[bytes | None]:
    """Return what decides each block's KV besides its tokens, as ``token_hashes`` takes it.

    A lone text is a salt, which a router finds in the request too. Whatever else there is (media)
    only has to differ where it differs. The name of the LoRA is part of the root already.
    """
    return [_extra_key(keys, event.lora_name) for keys in event.extra_keys or ()]


def _extra_key(keys: object, lora_name: str | None) -> bytes | None:
    rest = [key for key in keys if key != lora_name] if isinstance(keys, list) else []
    if not rest:
        return None
    if len(rest) == 1 and isinstance(rest[0], str):
        return salt_key(rest[0])
    return msgspec.msgpack.encode(rest)
