"""Blocks between a pool and GPU memory, without an engine: to the bit, and how fast.

Both movers, the one over the pinned pool and the one through staging buffers: blocks are stored,
the pool's bytes and digests compared with the GPU's, loaded into other blocks and compared again;
one flipped bit must be found, in its block alone. Then loads and stores by number of blocks, each
over what the host copies in one piece (``benchmarks.gpu.copy_limit``); loads while this thread
holds the interpreter's lock, as an engine's does that launches a forward pass; and by how much a
store slows the GPU's own work down.

    PYTHONPATH=/tmp/site:src python3 -m benchmarks.gpu.moves
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from benchmarks.gpu.copy_limit import copy_limits
from kvkeep.connector.worker.cuda_mover import CudaMover
from kvkeep.connector.worker.direct_mover import DirectMover
from kvkeep.connector.worker.landing import Landing
from kvkeep.connector.worker.movers import BlockMover, rank_digests
from kvkeep.connector.worker.views import EngineMemory, view_engine_memory
from kvkeep.model.layout import KvLayout
from kvkeep.tiers.shared_memory import PoolFile, PoolView

LAYERS, HEADS, TOKENS, HEAD_DIM = 40, 8, 16, 128
PAGE_BYTES = TOKENS * HEAD_DIM * 2 * 2
NUM_BLOCKS = 1500
ROUNDS = 5
CHECKED_PAGES = 200
BUSY_SHARE = 0.8
MATRIX, PRODUCTS = 8192, 360
"""Half a second of an H200, as the prompt takes whose blocks are stored meanwhile."""
STORED_BLOCKS, BATCH_BLOCKS = 625, 64
"""Of a prompt of 10,000 tokens, and of each lease."""
COST_ROUNDS = 7


def make_memory(layout: KvLayout) -> EngineMemory:
    """Random KV on the GPU, of the shape of a 14-billion-parameter model."""
    shape = (NUM_BLOCKS, HEADS, TOKENS, 2 * HEAD_DIM)
    tensors = {
        f"layers.{idx}": torch.randint(-30000, 30000, shape, dtype=torch.int16, device="cuda")
        .view(torch.bfloat16)
        for idx in range(LAYERS)
    }  # fmt: skip
    return view_engine_memory(tensors, NUM_BLOCKS, layout, tp_rank=0, tp_size=1)


def block_bytes(memory: EngineMemory, block: int) -> Any:
    """A block as the pool keeps it: uint8 ``[layers, heads, page_bytes]``."""
    rows = [tensor[block].contiguous().view(torch.uint8) for tensor in memory.tensors]
    return torch.stack(rows).reshape(LAYERS, HEADS, PAGE_BYTES).cpu().numpy()


def check(mover: BlockMover, memory: EngineMemory, pool: PoolView, chance: Any) -> None:
    """Raise if any byte is elsewhere, another, or not missed when it was changed."""
    order = chance.permutation(NUM_BLOCKS)
    source, target = order[:300].tolist(), order[300:600].tolist()
    slots = chance.permutation(pool.geometry.num_slots)[:300].tolist()
    assert mover.store(pool, source, slots, mover.snapshot()).all()
    for idx in (0, 151, 299):
        stored = pool.payload(slots[idx]).reshape(LAYERS, HEADS, PAGE_BYTES)
        assert np.array_equal(stored, block_bytes(memory, source[idx])), "stored elsewhere"
    for _ in range(CHECKED_PAGES):
        idx, layer, head = (int(chance.integers(limit)) for limit in (300, LAYERS, HEADS))
        page = pool.payload(slots[idx]).reshape(LAYERS, HEADS, PAGE_BYTES)[layer, head]
        digest = pool.digests[slots[idx], layer, head].tobytes()
        assert xxhash.xxh3_128_digest(page.tobytes()) == digest, "a digest of other bytes"
    digests = rank_digests(pool, slots, memory)
    assert mover.load(pool, slots, target, digests).all()
    for tensor in memory.tensors:
        rows = tensor.view(torch.int16)
        assert torch.equal(rows[source], rows[target]), "loaded other bytes"
    pool.payload(slots[77])[12_345_6 % pool.geometry.layout.block_bytes] ^= 4
    landed = mover.load(pool, slots, target, digests)
    assert landed.tolist() == [idx != 77 for idx in range(300)], "a flipped bit was not found"


def seconds(move: Callable[[], Any]) -> float:
    """The median over some rounds, after one that is not counted."""
    found = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        begun_s = time.perf_counter()
        move()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begun_s)
    return statistics.median(found[1:])


def measure(mover: BlockMover, memory: EngineMemory, pool: PoolView, count: int) -> dict[str, Any]:
    """GB/s of a store and of a load of so many blocks, and milliseconds until a load is begun."""
    chance = np.random.default_rng(count)
    blocks = chance.permutation(NUM_BLOCKS)[:count].tolist()
    slots = chance.permutation(pool.geometry.num_slots)[:count].tolist()
    store_s = seconds(lambda: mover.store(pool, blocks, slots, mover.snapshot()))
    digests = rank_digests(pool, slots, memory)
    load_s = seconds(lambda: mover.load(pool, slots, blocks, digests))

    def begin() -> Landing:
        return mover.begin_load(pool, slots, blocks, digests)

    begun = []
    for _ in range(ROUNDS):
        begun_s = time.perf_counter()
        landing = begin()
        begun.append(time.perf_counter() - begun_s)
        assert landing.wait().all()
    num_bytes = count * pool.geometry.layout.block_bytes
    return {
        "blocks": count,
        "store_gb_s": round(num_bytes / store_s / 1e9, 2),
        "load_gb_s": round(num_bytes / load_s / 1e9, 2),
        "load_ms": round(load_s * 1e3, 3),
        "begin_ms": round(statistics.median(begun) * 1e3, 3),
        "busy_ms": round(1e3 * busy_load_s(begin, load_s), 3),
    }


def busy_load_s(begin: Callable[[], Landing], load_s: float) -> float:
    """Seconds of a load during most of which this thread computes in Python."""
    found = []
    for _ in range(ROUNDS):
        begun_s = time.perf_counter()
        landing = begin()
        while time.perf_counter() - begun_s < BUSY_SHARE * load_s:
            pass
        assert landing.wait().all()
        found.append(time.perf_counter() - begun_s)
    return statistics.median(found)


def store_cost(mover: BlockMover, pool: PoolView) -> dict[str, Any]:
    """Milliseconds that storing a prompt's blocks takes from matrix products meanwhile."""
    chance = np.random.default_rng(7)
    blocks = chance.permutation(NUM_BLOCKS)[:STORED_BLOCKS].tolist()
    slots = chance.permutation(pool.geometry.num_slots)[:STORED_BLOCKS].tolist()
    left = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(left)

    def compute() -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(PRODUCTS):
            torch.mm(left, left, out=product)
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended))

    def store(after: Any) -> None:
        for start in range(0, STORED_BLOCKS, BATCH_BLOCKS):
            batch = slice(start, start + BATCH_BLOCKS)
            mover.store(pool, blocks[batch], slots[batch], after)

    compute()
    alone, beside = [], []
    for _ in range(COST_ROUNDS):
        alone.append(compute())
        thread = threading.Thread(target=store, args=(mover.snapshot(),))
        thread.start()
        beside.append(compute())
        thread.join()
    alone_ms, beside_ms = statistics.median(alone), statistics.median(beside)
    return {
        "products_ms": round(alone_ms, 2),
        "store_costs_ms": round(beside_ms - alone_ms, 2),
        "store_cost_share": round(beside_ms / alone_ms - 1, 5),
        "alone_min_max_ms": [round(f(alone), 2) for f in (min, max)],
        "beside_min_max_ms": [round(f(beside), 2) for f in (min, max)],
    }


def main() -> int:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool-gib", type=int, default=6)
    args = parser.parse_args()
    limits = copy_limits()
    print(json.dumps({"copy_limit_gb_per_s": limits}), flush=True)
    layout = KvLayout(LAYERS, HEADS, PAGE_BYTES, TOKENS, "bfloat16", "test")
    memory = make_memory(layout)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = PoolFile.open(Path(folder) / "pool", args.pool_gib << 30)
        file.format(layout)
        pool = file.view()
        for mover in (DirectMover(memory), CudaMover(memory)):
            begun_s = time.perf_counter()
            mover.map_pool(pool)
            pinned_s = round(time.perf_counter() - begun_s, 3)
            check(mover, memory, pool, np.random.default_rng(1))
            name = type(mover).__name__
            print(json.dumps({"mover": name, "checked": True, "map_pool_s": pinned_s}), flush=True)
            for count in (1, 8, 32, 64, 128, 625, 1250):
                row = {"mover": name} | measure(mover, memory, pool, count)
                print(json.dumps(row), flush=True)
            row = {"mover": name} | store_cost(mover, pool)
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
