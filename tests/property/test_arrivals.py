"""Whatever is damaged and mended while gates open: found is what was bad when its gate opened."""

import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.transfer.arrivals import ReferenceVerification, Runs, Verification, begin_verification
from tests.unit.transfer.gates import Door

shapes = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(0, 6),
        "num_layers": st.integers(1, 5),
        "num_heads": st.integers(1, 4),
        "page_bytes": st.one_of(st.integers(1, 700), st.sampled_from([8192, 48 << 10])),
    }
)


@settings(deadline=None)
@given(shape=shapes, num_threads=st.integers(1, 5), is_compiled=st.booleans(), data=st.data())
def test_found_is_what_was_bad_when_its_gate_opened(
    shape: dict[str, int], num_threads: int, is_compiled: bool, data: st.DataObject
) -> None:
    """Pages are damaged at the start, or mended or damaged just before their gate opens."""
    num_blocks, num_layers = shape["num_blocks"], shape["num_layers"]
    num_heads, page_bytes = shape["num_heads"], shape["page_bytes"]
    first = data.draw(st.integers(0, num_heads - 1))
    run_pages = data.draw(st.integers(1, num_heads - first))
    chance = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    order = chance.permutation(num_blocks)
    pages = chance.integers(0, 256, (num_blocks, num_layers, num_heads, page_bytes), np.uint8)
    mine = pages[order][:, :, first : first + run_pages]
    digests = np.frombuffer(
        b"".join(xxhash.xxh3_128_digest(p.tobytes()) for p in mine.reshape(-1, page_bytes)),
        np.uint8,
    ).reshape(num_blocks, num_layers, run_pages, 16)
    ends = sorted(data.draw(st.lists(st.integers(0, num_layers), max_size=4)))
    ends.append(num_layers)
    places = st.tuples(st.integers(0, num_blocks - 1), st.integers(0, num_layers - 1))
    early, late = (
        data.draw(st.sets(places, max_size=5)) if num_blocks else set() for _ in range(2)
    )

    def flip(block: int, layer: int) -> None:
        pages[order[block], layer, first + (block + layer) % run_pages, page_bytes // 2] ^= 1

    for place in early:
        flip(*place)
    base = pages.ctypes.data + first * page_bytes
    starts = np.array([base + slot * pages.strides[0] for slot in order], np.uint64)
    runs = Runs(starts, num_layers, num_heads * page_bytes, run_pages, page_bytes)
    doors = [Door() for _ in ends]
    gates = [door.gate(end) for door, end in zip(doors, ends, strict=True)]
    verification: Verification
    if is_compiled:
        verification = begin_verification(runs, digests, gates, num_threads=num_threads)
    else:
        verification = ReferenceVerification(runs, digests, gates)
    begin = 0
    for door, end in zip(doors, ends, strict=True):
        for place in late:
            if begin <= place[1] < end:
                flip(*place)
        door.open()
        begin = end

    bad = {block for block, _ in early ^ late}
    assert np.flatnonzero(~verification.wait()).tolist() == sorted(bad)
