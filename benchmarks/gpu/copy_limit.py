"""How fast this host copies between pinned shared memory and the GPU: the limit of any load.

One line of JSON: GB/s per direction and size of piece. Pieces of one layer's head (8 KiB in the
models measured here) and of one layer's block (64 KiB) are given to the driver in one batch, as
vLLM's own ``swap_blocks_batch`` does it; large ones are plain copies.

    python3 -m benchmarks.gpu.copy_limit
"""

import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

TOTAL_BYTES = 512 << 20
BATCHED = (8 << 10, 64 << 10, 1 << 20)
PLAIN = (5 << 19, 64 << 20)
ROUNDS = 5


def copy_limits() -> dict[str, float | str]:
    """Measure in a process of its own, so that no memory of the GPU stays taken."""
    command = [sys.executable, "-m", "benchmarks.gpu.copy_limit"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "not done in 180 s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": done.stderr.strip()[-300:]}
    return dict(json.loads(lines[-1]))


def pinned_shared(torch: Any, num_bytes: int) -> Any:
    """A tensor over a file in /dev/shm, registered with the driver as the pool is."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), num_bytes)
        memory = mmap.mmap(file.fileno(), num_bytes)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    host.fill_(1)
    code = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), num_bytes, 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister of shared memory failed: {code}")
    return host


def rate(torch: Any, copy: Callable[[], None]) -> float:
    """GB/s of a copy of ``TOTAL_BYTES``; the median, after one round that is not counted."""
    seconds = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        copy()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return round(TOTAL_BYTES / statistics.median(seconds[1:]) / 1e9, 1)


def plain(source: Any, target: Any, piece: int) -> Callable[[], None]:
    """Copies of consecutive pieces, all queued at once."""
    pairs = list(zip(source.split(piece), target.split(piece), strict=True))

    def copy() -> None:
        for left, right in pairs:
            right.copy_(left, non_blocking=True)

    return copy


def batched(torch: Any, source: Any, target: Any, piece: int) -> Callable[[], None]:
    """One batch of pieces, scattered in the source and in order in the target."""
    from vllm._custom_ops import swap_blocks_batch

    order = list(range(TOTAL_BYTES // piece))
    random.Random(1).shuffle(order)
    step = torch.arange(len(order), dtype=torch.int64) * piece
    scattered = torch.tensor(order, dtype=torch.int64) * piece + source.data_ptr()
    sizes = torch.full_like(step, piece)
    return lambda: swap_blocks_batch(scattered, step + target.data_ptr(), sizes)


def main() -> None:
    """Measure both directions."""
    import torch

    host = pinned_shared(torch, TOTAL_BYTES)
    device = torch.zeros(TOTAL_BYTES, dtype=torch.uint8, device="cuda")
    found: dict[str, float | str] = {}
    for name, source, target in (("to_gpu", host, device), ("to_host", device, host)):
        for piece in PLAIN:
            found[f"{name}.{piece >> 10}k"] = rate(torch, plain(source, target, piece))
        for piece in BATCHED:
            try:
                copy = batched(torch, source, target, piece)
                found[f"{name}.batch.{piece >> 10}k"] = rate(torch, copy)
            except (ImportError, AttributeError, RuntimeError) as error:
                found[f"{name}.batch"] = str(error)[:200]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
