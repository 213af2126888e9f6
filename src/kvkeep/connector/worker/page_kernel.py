"""The GPU kernel that moves blocks between slots and the engine's KV tensors.

Slots lie in the pool, which a load reads over the bus itself, or in GPU memory, where a store
gathers. One launch moves any number of blocks and layers, where copy commands of a layer of a block
each would cost the launching thread a microsecond apiece.
"""

import triton  # comes with vLLM for GPUs
import triton.language as tl

WORDS_AT_ONCE = 1024
"""64-bit words that a program moves at a time: 8 KiB."""
NUM_WARPS = 4
GATHERED_AT_ONCE = 4096
"""Four times as many within GPU memory, to be done in a quarter of the time: while a program runs,
it takes a processor's room from the engine."""
GATHERING_WARPS = 8


# Counts are not specialized: a kernel compiled anew in mid-service would stall the engine.
@triton.jit(do_not_specialize=["num_blocks", "first_layer", "num_layers"])
def move_blocks(  # noqa: PLR0913 - a kernel takes numbers, not objects
    pool,
    layers,
    slots,
    block_ids,
    num_blocks,
    first_layer,
    num_layers,
    slot_words,
    slot_layer_words,
    first_word,
    block_words,
    RUN_WORDS: tl.constexpr,
    IS_LOAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Move the heads of this rank of some layers of some blocks; layers come one after the other.

    Args:
        pool: Address of slot 0.
        layers: int64 ``[layers]``: address of block 0 of each layer.
        slots: int64 ``[num_blocks]``.
        block_ids: int64 ``[num_blocks]``.
        num_blocks: Blocks.
        first_layer: Of those that move.
        num_layers: That move.
        slot_words: From a slot to the next, in words of 8 bytes.
        slot_layer_words: From a layer of a slot to the next.
        first_word: Of this rank's heads in a layer of a slot.
        block_words: From a block of the engine to the next.
        RUN_WORDS: Of this rank's heads of a layer of a block.
        IS_LOAD: From the pool to the engine, or back.
        AT_ONCE: Words per iteration.
    """
    pool_words = pool.to(tl.pointer_type(tl.int64))
    within = tl.arange(0, AT_ONCE)
    num_pieces = tl.cdiv(RUN_WORDS, AT_ONCE)
    for work in range(tl.program_id(0), num_layers * num_blocks * num_pieces, tl.num_programs(0)):
        piece = work % num_pieces
        block = (work // num_pieces) % num_blocks
        layer = first_layer + work // (num_pieces * num_blocks)
        word = piece * AT_ONCE + within
        is_inside = word < RUN_WORDS
        slot_start = tl.load(slots + block) * slot_words + layer * slot_layer_words + first_word
        engine_words = tl.load(layers + layer).to(tl.pointer_type(tl.int64))
        block_start = tl.load(block_ids + block) * block_words
        if IS_LOAD:
            # Past the first-level cache: nothing is read twice.
            words = tl.load(pool_words + slot_start + word, mask=is_inside, cache_modifier=".cg")
            tl.store(engine_words + block_start + word, words, mask=is_inside)
        else:
            words = tl.load(engine_words + block_start + word, mask=is_inside)
            tl.store(pool_words + slot_start + word, words, mask=is_inside)
