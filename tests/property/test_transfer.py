"""The compiled copier does what the reference does, whatever the pages and their damage."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.testing.transfer_contract import Memory, blank_memory, digests_of, filled_memory
from kvkeep.transfer.base import DIGEST_BYTES, PageCopier
from kvkeep.transfer.host_copy import CompiledCopier, ReferenceCopier

REFERENCE = ReferenceCopier()

shapes = st.fixed_dictionaries(
    {
        "num_pages": st.integers(0, 80),
        "page_bytes": st.one_of(st.integers(1, 2100), st.sampled_from([4096, 8192, 65536])),
        "gap_bytes": st.integers(0, 130),
        "seed": st.integers(0, 2**32),
    }
)


def stored(copier: PageCopier, source: Memory) -> tuple[Memory, bytes]:
    """Store into fresh memory; return it and the digests."""
    num_pages = len(source.order)
    gap_bytes = source.buffer.shape[1] - source.page_bytes
    target = blank_memory(num_pages, source.page_bytes, seed=1, gap_bytes=gap_bytes)
    digests = np.zeros((num_pages, DIGEST_BYTES), np.uint8)
    copier.store(source.addresses, target.addresses, source.page_bytes, digests)
    return target, digests.tobytes()


@settings(deadline=None)
@given(shape=shapes, num_threads=st.integers(1, 5))
def test_store_is_the_same(shape: dict[str, int], num_threads: int) -> None:
    """Both copiers leave the same bytes, in and between the pages, and the same digests."""
    source = filled_memory(**shape)

    expected, expected_digests = stored(REFERENCE, source)
    actual, actual_digests = stored(CompiledCopier(num_threads=num_threads), source)

    assert actual_digests == expected_digests
    np.testing.assert_array_equal(actual.buffer, expected.buffer)


@settings(deadline=None)
@given(shape=shapes, num_threads=st.integers(1, 5), data=st.data())
def test_load_and_verify_are_the_same(
    shape: dict[str, int], num_threads: int, data: st.DataObject
) -> None:
    """Both copiers find exactly the pages in which a bit was flipped, and land the others."""
    source = filled_memory(**shape)
    digests = digests_of(source)
    num_pages, page_bytes = shape["num_pages"], shape["page_bytes"]
    damaged = data.draw(st.sets(st.integers(0, num_pages - 1))) if num_pages else set()
    for page_idx in sorted(damaged):
        source.flip_bit(page_idx, data.draw(st.integers(0, page_bytes * 8 - 1)))

    landed = []
    for copier in (REFERENCE, CompiledCopier(num_threads=num_threads)):
        target = blank_memory(num_pages, page_bytes, seed=2)
        is_loaded = np.zeros(num_pages, np.bool_)
        is_verified = np.zeros(num_pages, np.uint8)
        arrays = (source.addresses, target.addresses, page_bytes, digests, is_loaded)
        assert copier.load(*arrays) == len(damaged)
        assert copier.verify(source.addresses, page_bytes, digests, is_verified) == len(damaged)
        assert np.flatnonzero(~is_loaded).tolist() == sorted(damaged)
        assert np.flatnonzero(is_verified == 0).tolist() == sorted(damaged)
        landed.append(target.buffer)

    np.testing.assert_array_equal(landed[0], landed[1])
