"""What a fuzzer does to good bytes, and what a reader may cost."""

import contextlib
import os
import struct
import tracemalloc
from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st

DEPTH = 50 if os.environ.get("NIGHTLY") else 1
"""How much longer than usual."""

EDGES = [1 << bits for bits in (0, 7, 8, 16, 20, 31, 32, 60, 63, 64)]
NUMBERS = st.sampled_from([0, *EDGES[:-1], *(edge - 1 for edge in EDGES)]) | st.integers(
    0, (1 << 64) - 1
)


def examples(number: int) -> settings:
    """So many examples in a quick run, and many more in a nightly one."""
    return settings(max_examples=number * DEPTH, deadline=None)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """These bytes after up to four cuts, insertions, exchanges and hostile numbers."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "bytes", "insert", "number", "repeat"])):
            case "cut":
                del data[at:]
            case "bytes":
                new = draw(st.binary(max_size=8))
                data[at : at + len(new)] = new
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
            case "number":
                packed = struct.pack("<Q", draw(NUMBERS))[: draw(st.sampled_from([1, 2, 4, 8]))]
                data[at : at + len(packed)] = packed
            case "repeat":
                data[at:at] = data[max(0, at - 16) : at] * draw(st.integers(1, 40))
    return bytes(data)


@contextlib.contextmanager
def costing_at_most(num_bytes: int) -> Iterator[None]:
    """Fail if more memory than this is taken at any time inside."""
    tracemalloc.start()
    try:
        yield
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes <= num_bytes, f"{peak_bytes} bytes were taken, {num_bytes} are allowed"
