"""What every ``PageCopier`` promises, as tests to inherit.

class TestMyCopier(TransferContract):
    @pytest.fixture
    def copier(self) -> PageCopier:
        return MyCopier()
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from kvkeep.transfer.base import DIGEST_BYTES, PAGE_BYTES_MAX, PageCopier

UNTOUCHED = 0xA5
"""What memory holds that nobody should have written."""


@dataclass(frozen=True)
class Memory:
    """Pages scattered over a buffer, with a gap between any two."""

    buffer: NDArray[np.uint8]
    """uint8 ``[num_pages, page_bytes + gap_bytes]``"""
    page_bytes: int
    order: NDArray[np.int64]
    """int64 ``[num_pages]``: which row of the buffer holds which page."""

    @property
    def addresses(self) -> NDArray[np.uint64]:
        """Where the pages lie, uint64 ``[num_pages]``."""
        offsets = self.order.astype(np.uint64) * np.uint64(self.buffer.strides[0])
        return offsets + np.uint64(self.buffer.ctypes.data)

    @property
    def pages(self) -> NDArray[np.uint8]:
        """A copy of the pages, uint8 ``[num_pages, page_bytes]``."""
        return self.buffer[self.order, : self.page_bytes]

    @property
    def gaps(self) -> NDArray[np.uint8]:
        """A copy of what lies between the pages, uint8 ``[num_pages, gap_bytes]``."""
        return self.buffer[:, self.page_bytes :].copy()

    def flip_bit(self, page_idx: int, bit_idx: int) -> None:
        """Damage one page."""
        self.buffer[self.order[page_idx], bit_idx // 8] ^= 1 << bit_idx % 8


def filled_memory(num_pages: int, page_bytes: int, *, seed: int, gap_bytes: int = 64) -> Memory:
    """Return memory with random pages."""
    memory = blank_memory(num_pages, page_bytes, seed=seed, gap_bytes=gap_bytes)
    chance = np.random.default_rng(seed)
    memory.buffer[:, :page_bytes] = chance.integers(0, 256, (num_pages, page_bytes), np.uint8)
    return memory


def blank_memory(num_pages: int, page_bytes: int, *, seed: int, gap_bytes: int = 64) -> Memory:
    """Return memory that holds ``UNTOUCHED`` everywhere."""
    order = np.random.default_rng(seed).permutation(num_pages)
    buffer = np.full((num_pages, page_bytes + gap_bytes), UNTOUCHED, dtype=np.uint8)
    return Memory(buffer=buffer, page_bytes=page_bytes, order=order)


def digests_of(memory: Memory) -> NDArray[np.uint8]:
    """Return what python-xxhash says, uint8 ``[num_pages, 16]``."""
    digests = [xxhash.xxh3_128_digest(page.tobytes()) for page in memory.pages]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), DIGEST_BYTES).copy()


def read_only(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a view of the array that can't be written through."""
    view = array.view()
    view.flags.writeable = False
    return view


WRONG_PAGES: list[tuple[dict[str, Any], str]] = [
    ({"page_bytes": 0}, r"page_bytes must be 1 to"),
    ({"page_bytes": PAGE_BYTES_MAX + 1}, r"page_bytes must be 1 to"),
    ({"source": np.zeros(3, np.int64)}, r"source must be uint64"),
    ({"source": np.zeros((3, 1), np.uint64)}, r"source must be uint64"),
    ({"source": np.zeros(6, np.uint64)[::2]}, r"source must be uint64"),
    ({"target": np.zeros(2, np.uint64)}, r"source and target must have as many pages"),
    ({"target": np.zeros(6, np.uint64)[::2]}, r"target must be uint64"),
]
"""What does not fit three pages of 8 KiB, and the sentence that says so."""

WRONG_DIGESTS: list[tuple[dict[str, Any], str]] = [
    ({"digests": np.zeros((3, 8), np.uint8)}, r"must be uint8 \[3, 16\]"),
    ({"digests": np.zeros((3, 16), np.int8)}, r"must be uint8 \[3, 16\]"),
    ({"digests": np.zeros((3, 32), np.uint8)[:, ::2]}, r"must be uint8 \[3, 16\]"),
]
READ_ONLY_DIGESTS: tuple[dict[str, Any], str] = (
    {"digests": read_only(np.zeros((3, 16), np.uint8))},
    r"digests_out must be .* writable",
)

WRONG_FLAGS: list[tuple[dict[str, Any], str]] = [
    ({"ok": np.zeros(4, np.bool_)}, r"ok_out must be bool or uint8 \[3\]"),
    ({"ok": np.zeros(3, np.int64)}, r"ok_out must be bool or uint8 \[3\]"),
    ({"ok": np.zeros(6, np.bool_)[::2]}, r"ok_out must be bool or uint8 \[3\]"),
    ({"ok": read_only(np.zeros(3, np.uint8))}, r"ok_out must be .* writable"),
]


class TransferContract:
    """Inherit, and give a ``copier``."""

    @pytest.fixture
    def copier(self) -> PageCopier:
        """Return the copier under test."""
        raise NotImplementedError("a subclass of TransferContract gives the fixture `copier`")

    @pytest.mark.parametrize("page_bytes", [1, 16, 129, 241, 1000, 4096, 8192, 8256, 65536])
    def test_store_copies_and_digests(self, copier: PageCopier, page_bytes: int) -> None:
        """A stored page has its source's bytes, and the digest that python-xxhash gives."""
        source = filled_memory(37, page_bytes, seed=1)
        target = blank_memory(37, page_bytes, seed=2)
        digests = np.zeros((37, DIGEST_BYTES), np.uint8)

        copier.store(source.addresses, target.addresses, page_bytes, digests)

        np.testing.assert_array_equal(target.pages, source.pages)
        np.testing.assert_array_equal(digests, digests_of(source))

    @pytest.mark.parametrize("page_bytes", [1, 16, 129, 241, 1000, 4096, 8192, 8256, 65536])
    def test_load_brings_back_what_was_stored(self, copier: PageCopier, page_bytes: int) -> None:
        """Loaded pages are the stored pages, and every flag is 1."""
        source = filled_memory(37, page_bytes, seed=3)
        target = blank_memory(37, page_bytes, seed=4)
        is_ok = np.zeros(37, np.bool_)

        num_bad = copier.load(
            source.addresses, target.addresses, page_bytes, digests_of(source), is_ok
        )

        assert num_bad == 0
        assert is_ok.all()
        np.testing.assert_array_equal(target.pages, source.pages)

    @pytest.mark.parametrize("gap_bytes", [1, 7, 32, 64, 4096])
    def test_nothing_beyond_a_page_is_written(self, copier: PageCopier, gap_bytes: int) -> None:
        """Pages at any address, aligned or not, land without touching what lies between them."""
        source = filled_memory(21, 8192, seed=5, gap_bytes=gap_bytes)
        target = blank_memory(21, 8192, seed=6, gap_bytes=gap_bytes)
        back = blank_memory(21, 8192, seed=7, gap_bytes=gap_bytes)
        digests = np.zeros((21, DIGEST_BYTES), np.uint8)

        copier.store(source.addresses, target.addresses, 8192, digests)
        copier.load(target.addresses, back.addresses, 8192, digests, np.zeros(21, np.bool_))

        np.testing.assert_array_equal(back.pages, source.pages)
        assert (target.gaps == UNTOUCHED).all()
        assert (back.gaps == UNTOUCHED).all()

    @pytest.mark.parametrize("bit_idx", [0, 1023, 8192, 65535])
    def test_load_finds_a_flipped_bit(self, copier: PageCopier, bit_idx: int) -> None:
        """One flipped bit makes its page bad, and no other, and the bad page does not land."""
        source = filled_memory(9, 8192, seed=8)
        target = blank_memory(9, 8192, seed=9)
        digests = digests_of(source)
        source.flip_bit(4, bit_idx)
        is_ok = np.full(9, 7, np.uint8)

        num_bad = copier.load(source.addresses, target.addresses, 8192, digests, is_ok)

        assert num_bad == 1
        assert is_ok.tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1]
        others = is_ok == 1
        np.testing.assert_array_equal(target.pages[others], source.pages[others])
        assert (target.pages[4] == UNTOUCHED).all()

    def test_load_finds_swapped_pages(self, copier: PageCopier) -> None:
        """Two whole pages in each other's place are both bad."""
        source = filled_memory(5, 8192, seed=10)
        target = blank_memory(5, 8192, seed=11)
        digests = digests_of(source)
        swapped = source.addresses[[0, 3, 2, 1, 4]]
        is_ok = np.zeros(5, np.bool_)

        assert copier.load(swapped, target.addresses, 8192, digests, is_ok) == 2
        assert is_ok.tolist() == [True, False, True, False, True]

    def test_load_goes_by_the_digests_it_was_given(self, copier: PageCopier) -> None:
        """A slot that got other, whole, properly digested bytes is bad for a stale reader."""
        pool = filled_memory(3, 8192, seed=12)
        stale_digests = digests_of(pool)
        newer = filled_memory(3, 8192, seed=13)
        target = blank_memory(3, 8192, seed=14)
        newer_digests = np.zeros((3, DIGEST_BYTES), np.uint8)
        copier.store(newer.addresses, pool.addresses, 8192, newer_digests)
        is_ok = np.ones(3, np.bool_)

        assert copier.load(pool.addresses, target.addresses, 8192, stale_digests, is_ok) == 3
        assert not is_ok.any()
        assert (target.pages == UNTOUCHED).all()

    def test_digest_reads_in_place(self, copier: PageCopier) -> None:
        """Each page has the digest that a store of it gives, and nothing is moved."""
        memory = filled_memory(50, 8192, seed=3)
        before = memory.buffer.copy()
        digests = np.zeros((50, DIGEST_BYTES), np.uint8)
        copier.digest(memory.addresses, 8192, digests)

        assert [d.tobytes() for d in digests] == [xxhash.xxh3_128_digest(p) for p in memory.pages]
        assert np.array_equal(memory.buffer, before)
        with pytest.raises(ValueError, match="digests_out"):
            copier.digest(memory.addresses, 8192, digests[1:])
        copier.digest(memory.addresses[:0], 8192, digests[:0])

    def test_verify_compares_in_place(self, copier: PageCopier) -> None:
        """Verify names the damaged pages and changes no byte."""
        memory = filled_memory(33, 8192, seed=15)
        digests = digests_of(memory)
        memory.flip_bit(0, 5)
        memory.flip_bit(32, 65535)
        before = memory.buffer.copy()
        is_ok = np.zeros(33, np.bool_)

        num_bad = copier.verify(memory.addresses, 8192, digests, is_ok)

        assert num_bad == 2
        assert np.flatnonzero(~is_ok).tolist() == [0, 32]
        np.testing.assert_array_equal(memory.buffer, before)

    def test_many_chunks(self, copier: PageCopier) -> None:
        """Enough pages for every thread to take several turns: each is done, each flag is right."""
        source = filled_memory(601, 8192, seed=16)
        target = blank_memory(601, 8192, seed=17)
        digests = digests_of(source)
        bad = list(range(0, 601, 50))
        for page_idx in bad:
            source.flip_bit(page_idx, page_idx)
        is_ok = np.zeros(601, np.bool_)

        num_bad = copier.load(source.addresses, target.addresses, 8192, digests, is_ok)

        assert num_bad == len(bad)
        assert np.flatnonzero(~is_ok).tolist() == bad
        np.testing.assert_array_equal(target.pages[is_ok], source.pages[is_ok])

    def test_no_pages(self, copier: PageCopier) -> None:
        """No pages are no work and no error."""
        none = np.zeros(0, np.uint64)
        digests = np.zeros((0, DIGEST_BYTES), np.uint8)
        is_ok = np.zeros(0, np.bool_)

        copier.store(none, none, 8192, digests)

        assert copier.load(none, none, 8192, digests, is_ok) == 0
        assert copier.verify(none, 8192, digests, is_ok) == 0

    def test_digests_may_be_read_only(self, copier: PageCopier) -> None:
        """Expected digests may lie in memory that is mapped read-only."""
        source = filled_memory(2, 8192, seed=18)
        target = blank_memory(2, 8192, seed=19)
        digests = read_only(digests_of(source))
        is_ok = np.zeros(2, np.bool_)

        assert copier.load(source.addresses, target.addresses, 8192, digests, is_ok) == 0
        assert copier.verify(source.addresses, 8192, digests, is_ok) == 0

    def test_a_racing_writer_makes_pages_bad_never_wrong(self, copier: PageCopier) -> None:
        """While somebody overwrites the source, a page that lands is the page asked for."""
        wanted, other = filled_memory(16, 8192, seed=22), filled_memory(16, 8192, seed=23)
        source, target = blank_memory(16, 8192, seed=22), blank_memory(16, 8192, seed=24)
        digests = digests_of(wanted)
        is_over = threading.Event()

        def overwrite() -> None:
            while not is_over.is_set():
                source.buffer[:] = other.buffer
                source.buffer[:] = wanted.buffer

        writer = threading.Thread(target=overwrite)
        writer.start()
        try:
            for _ in range(300):
                target.buffer[:] = UNTOUCHED
                is_ok = np.zeros(16, np.bool_)
                copier.load(source.addresses, target.addresses, 8192, digests, is_ok)
                np.testing.assert_array_equal(target.pages[is_ok], wanted.pages[is_ok])
                assert (target.pages[~is_ok] == UNTOUCHED).all()
        finally:
            is_over.set()
            writer.join()

    @pytest.mark.parametrize(("wrong", "sentence"), WRONG_PAGES + WRONG_DIGESTS + WRONG_FLAGS)
    def test_load_refuses_arrays_that_do_not_fit(
        self, copier: PageCopier, wrong: dict[str, Any], sentence: str
    ) -> None:
        """Load refuses what does not fit in a sentence, before a byte has moved."""
        target = blank_memory(3, 8192, seed=20)
        given = _arguments(target) | wrong

        with pytest.raises(ValueError, match=sentence):
            copier.load(
                given["source"],
                given["target"],
                given["page_bytes"],
                given["digests"],
                given["ok"],
            )

        assert (target.buffer == UNTOUCHED).all()

    @pytest.mark.parametrize(
        ("wrong", "sentence"), [*WRONG_PAGES, *WRONG_DIGESTS, READ_ONLY_DIGESTS]
    )
    def test_store_refuses_arrays_that_do_not_fit(
        self, copier: PageCopier, wrong: dict[str, Any], sentence: str
    ) -> None:
        """Store refuses what does not fit in a sentence, before a byte has moved."""
        target = blank_memory(3, 8192, seed=20)
        given = _arguments(target) | wrong

        with pytest.raises(ValueError, match=sentence):
            copier.store(given["source"], given["target"], given["page_bytes"], given["digests"])

        assert (target.buffer == UNTOUCHED).all()

    @pytest.mark.parametrize(("wrong", "sentence"), WRONG_DIGESTS + WRONG_FLAGS)
    def test_verify_refuses_arrays_that_do_not_fit(
        self, copier: PageCopier, wrong: dict[str, Any], sentence: str
    ) -> None:
        """Verify refuses what does not fit in a sentence."""
        given = _arguments(blank_memory(3, 8192, seed=20)) | wrong

        with pytest.raises(ValueError, match=sentence):
            copier.verify(given["source"], given["page_bytes"], given["digests"], given["ok"])


def _arguments(target: Memory) -> dict[str, Any]:
    source = filled_memory(3, 8192, seed=21)
    return {
        "source": source.addresses,
        "target": target.addresses,
        "page_bytes": 8192,
        "digests": digests_of(source),
        "ok": np.full(3, 7, np.uint8),
    }
