"""Address arithmetic, the choice of a copier, and the compiled one's threads."""

import os
import sys
import threading

import numpy as np
import pytest

from kvkeep.testing.transfer_contract import blank_memory, digests_of, filled_memory
from kvkeep.transfer.host_copy import (
    CompiledCopier,
    ReferenceCopier,
    addresses,
    open_copier,
)
from tests.integration.daemons import wait_until


def test_addresses_of_scattered_blocks() -> None:
    """A page lies at its layer's base, plus its block's and its head's stride."""
    located = addresses(
        np.array([1_000_000, 5_000_000], np.uint64),
        block_stride_bytes=1000,
        head_stride_bytes=10,
        block_ids=[7, 0, 3],
        head_range=range(1, 3),
    )

    assert located.dtype == np.uint64
    assert located.flags.c_contiguous
    assert located.tolist() == [
        [[1_007_010, 1_007_020], [5_007_010, 5_007_020]],
        [[1_000_010, 1_000_020], [5_000_010, 5_000_020]],
        [[1_003_010, 1_003_020], [5_003_010, 5_003_020]],
    ]


def test_addresses_above_two_to_the_63() -> None:
    """Addresses are unsigned: no step of the sum goes through a signed or a floating number."""
    base = 2**63 + 1
    located = addresses(
        np.array([base], np.uint64),
        block_stride_bytes=8192,
        head_stride_bytes=1,
        block_ids=np.array([2**40], np.int64),
        head_range=range(1),
    )

    assert located.item() == base + 8192 * 2**40


def test_addresses_of_nothing() -> None:
    """No blocks have no addresses."""
    located = addresses(
        np.array([1, 2], np.uint64),
        block_stride_bytes=8,
        head_stride_bytes=8,
        block_ids=[],
        head_range=range(3),
    )

    assert located.shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("stride_bytes", "block_ids", "heads"),
    [(-1, [0], range(1)), (8, [4, -1], range(1)), (8, [0], range(-1, 1))],
)
def test_addresses_below_the_base(stride_bytes: int, block_ids: list[int], heads: range) -> None:
    """A stride, block id or head below 0 is refused, not wrapped around."""
    with pytest.raises(ValueError, match="from 0 upwards"):
        addresses(
            np.array([4096], np.uint64),
            block_stride_bytes=stride_bytes,
            head_stride_bytes=8,
            block_ids=block_ids,
            head_range=heads,
        )


def test_open_copier_prefers_the_compiled_one() -> None:
    """Where the extension is built, it is used."""
    assert isinstance(open_copier(num_threads=2), CompiledCopier)


def test_open_copier_without_the_extension(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the extension copies go on, and the log says what would make them faster."""
    monkeypatch.setitem(sys.modules, "kvkeep.transfer._pages", None)
    monkeypatch.delattr("kvkeep.transfer._pages", raising=False)

    assert isinstance(open_copier(), ReferenceCopier)
    assert "Install gcc, python3-dev and libxxhash-dev" in caplog.text


@pytest.mark.parametrize("num_threads", [0, -1, 17])
def test_number_of_threads_out_of_range(num_threads: int) -> None:
    """A number of threads outside 1 to 16 stops the start."""
    with pytest.raises(ValueError, match=f"1 to 16. num_threads={num_threads}"):
        open_copier(num_threads=num_threads)


@pytest.mark.parametrize("cpus", [set(), {-1}, {1024}])
def test_cpus_that_do_not_exist(cpus: set[int]) -> None:
    """CPUs that no machine has stop the start."""
    with pytest.raises(ValueError, match="cpus must name CPUs of this machine"):
        open_copier(num_threads=2, cpus=cpus)


def test_cpus_the_system_refuses() -> None:
    """Threads that can't have their CPUs run on the caller's: the copy is right all the same."""
    source = filled_memory(200, 8192, seed=1)
    target = blank_memory(200, 8192, seed=2)
    copier = CompiledCopier(num_threads=4, cpus={1023})
    is_ok = np.zeros(200, np.bool_)

    num_bad = copier.load(source.addresses, target.addresses, 8192, digests_of(source), is_ok)

    assert num_bad == 0
    np.testing.assert_array_equal(target.pages, source.pages)


def test_threads_of_one_call_keep_apart() -> None:
    """Each thread of a call checks pages in a private place: none spoils another's."""
    source = filled_memory(600, 8192, seed=5)
    target = blank_memory(600, 8192, seed=6)
    digests = digests_of(source)
    copier = CompiledCopier(num_threads=2)
    is_ok = np.zeros(600, np.bool_)
    arguments = (source.addresses, target.addresses, 8192, digests, is_ok)

    assert [copier.load(*arguments) for _ in range(200)] == [0] * 200


def test_no_thread_outlives_its_call() -> None:
    """The threads of a call are gone when it returns, and the caller's affinity is as it was."""
    source = filled_memory(200, 8192, seed=3)
    before = os.sched_getaffinity(0)
    tasks = set(os.listdir("/proc/self/task"))

    CompiledCopier(num_threads=8).verify(
        source.addresses, 8192, digests_of(source), np.zeros(200, np.bool_)
    )

    assert os.sched_getaffinity(0) == before
    # A thread that was joined stands there until the kernel has taken it down.
    wait_until(lambda: set(os.listdir("/proc/self/task")) <= tasks, "the threads are gone")


def test_calls_from_several_threads() -> None:
    """Several threads may use one copier at once, on pages of their own."""
    copier = CompiledCopier(num_threads=2)
    memories = [filled_memory(100, 8192, seed=10 + idx) for idx in range(4)]
    targets = [blank_memory(100, 8192, seed=20 + idx) for idx in range(4)]
    counts = [-1] * 4

    def load(idx: int) -> None:
        digests = digests_of(memories[idx])
        is_ok = np.zeros(100, np.bool_)
        counts[idx] = copier.load(
            memories[idx].addresses, targets[idx].addresses, 8192, digests, is_ok
        )

    threads = [threading.Thread(target=load, args=(idx,)) for idx in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert counts == [0] * 4
    for memory, target in zip(memories, targets, strict=True):
        np.testing.assert_array_equal(target.pages, memory.pages)


def test_the_extension_checks_lengths_itself() -> None:
    """A slip in the Python that wraps it can't make the extension write beyond an array."""
    from kvkeep.transfer import _pages

    pages = filled_memory(3, 64, seed=4).addresses
    with pytest.raises(ValueError, match="arrays of different lengths"):
        _pages.store(pages, pages, 64, np.zeros((2, 16), np.uint8), 1, b"\xff" * 128)
    with pytest.raises(ValueError, match="arrays of different lengths"):
        _pages.load(
            pages, pages[:2], 64, np.zeros((3, 16), np.uint8), np.zeros(3, np.bool_), 1, b""
        )
    with pytest.raises(ValueError, match="number of threads"):
        _pages.verify(pages, 64, np.zeros((3, 16), np.uint8), np.zeros(3, np.bool_), 17, b"")
