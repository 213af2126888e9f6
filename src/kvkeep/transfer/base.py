"""The seam through which head pages move between an engine's memory and kvkeep's pool.

It is about addresses and bytes alone: which pages, whose lease and what happens to a bad page
are decided by the caller.
"""

from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES: Final = 16
"""XXH3-128 in its canonical (big-endian) form, as ``xxhash.xxh3_128_digest`` gives it."""

PAGE_BYTES_MAX: Final = 64 << 20
"""Far above any head page (8 KiB to 256 KiB); a larger one is a slip in somebody's arithmetic."""

PAGES_MAX: Final = 1 << 24
"""In one call: 128 GiB of 8 KiB pages, more than a pool."""

Addresses = NDArray[np.uint64]
"""uint64 ``[num_pages]``, C-contiguous: the address of each page in this process."""

Digests = NDArray[np.uint8]
"""uint8 ``[num_pages, 16]``, C-contiguous."""

Flags = NDArray[np.bool_] | NDArray[np.uint8]
"""bool or uint8 ``[num_pages]``, C-contiguous: 1 where a page's bytes match its digest."""


class PageCopier(Protocol):
    """Copies head pages between two memories of this process and checks their bytes.

    What it is: the one way bytes enter and leave the pool. Store makes a digest of every page,
    load and verify compare with it, so a page that rotted, was torn or was overwritten under a
    stale reader is found by its bytes, whatever the bookkeeping says.

    Life of one operation: the caller gathers addresses (``host_copy.addresses``), takes the
    digests out of the block headers *before* it loads, calls, and acts on ``ok_out``.

    The caller guarantees:
        * Every address is mapped for ``page_bytes`` bytes, readable or writable as needed, until
          the call returns. Nothing can check that: a wrong address ends the process.
        * No page of ``target`` overlaps another page of ``target`` or of ``source``.
        * Nobody else writes ``target``, the digests or the flags during the call.

    The implementer must:
        * check the arrays first: a ``ValueError`` in one sentence, and nothing was touched;
        * raise nothing for a page that does not match: that is an answer, not an error;
        * give the same bytes, digests and flags as every other implementation.

    Threading and blocking: every method blocks until all its pages are done and may be called
    from several threads at once on different pages.
    """

    def store(
        self, source: Addresses, target: Addresses, page_bytes: int, digests_out: Digests
    ) -> None:
        """Digest each source page, then copy it to its target.

        In this order, because a source that changes between the two leaves a page that no longer
        matches its digest: whoever loads it finds out.

        Args:
            source: Pages to read.
            target: Where each goes; as many as ``source``.
            page_bytes: Bytes per page, 1 to ``PAGE_BYTES_MAX``.
            digests_out: Receives the digest of each source page.

        Raises:
            ValueError: The arrays do not fit together; nothing was written.
        """
        ...

    def load(
        self,
        source: Addresses,
        target: Addresses,
        page_bytes: int,
        digests: Digests,
        ok_out: Flags,
    ) -> int:
        """Copy each page whose bytes match its digest; leave the target of the others alone.

        The bytes compared are the bytes that land: each source page is read once, into memory
        that nobody else writes. A writer who races with the load can make a page bad, never wrong.

        Args:
            source: Pages to read.
            target: Where each goes; as many as ``source``.
            page_bytes: Bytes per page, 1 to ``PAGE_BYTES_MAX``.
            digests: What each page must have, taken by the caller before the call.
            ok_out: Receives 1 for each page that landed, 0 for each that did not.

        Returns:
            Number of pages that did not match, and so did not land.

        Raises:
            ValueError: The arrays do not fit together; nothing was written.
        """
        ...

    def verify(self, addresses: Addresses, page_bytes: int, digests: Digests, ok_out: Flags) -> int:
        """Compare each page with its digest where it lies.

        Args:
            addresses: Pages to read.
            page_bytes: Bytes per page, 1 to ``PAGE_BYTES_MAX``.
            digests: What each page must have.
            ok_out: Receives 1 for each page that matches, 0 for each that does not.

        Returns:
            Number of pages that did not match.

        Raises:
            ValueError: The arrays do not fit together; nothing was written.
        """
        ...

    def digest(self, addresses: Addresses, page_bytes: int, digests_out: Digests) -> None:
        """Digest each page where it lies: of a device that wrote the pages itself.

        Args:
            addresses: Pages to read.
            page_bytes: Bytes per page, 1 to ``PAGE_BYTES_MAX``.
            digests_out: Receives the digest of each page.

        Raises:
            ValueError: The arrays do not fit together; nothing was written.
        """
        ...
