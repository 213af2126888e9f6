"""Pages are compared after their gate has opened, in C, without Python's leave."""

import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from kvkeep.model.errors import UnavailableError
from kvkeep.transfer import _pages
from kvkeep.transfer.arrivals import (
    Gate,
    ReferenceVerification,
    Runs,
    Verification,
    begin_verification,
)
from kvkeep.transfer.host_copy import cpu_mask
from tests.unit.transfer.gates import Door, failing_gate, open_gate

SLOTS, LAYERS, HEADS, PAGE_BYTES = 9, 6, 5, 32 << 10
"""Large enough for every thread of the extension to have something to do."""
FIRST_HEAD, RUN_PAGES = 1, 3
WANTED = [7, 0, 8, 4]


class Slots:
    """Slots as a pool keeps them, full of random pages, and the digests of a rank's heads."""

    def __init__(self, seed: int = 1) -> None:
        chance = np.random.default_rng(seed)
        shape = (SLOTS, LAYERS, HEADS, PAGE_BYTES)
        self.pages = chance.integers(0, 256, shape, np.uint8)
        first = self.pages.ctypes.data + FIRST_HEAD * PAGE_BYTES
        starts = [first + slot * self.pages.strides[0] for slot in WANTED]
        self.runs = Runs(
            np.array(starts, np.uint64), LAYERS, HEADS * PAGE_BYTES, RUN_PAGES, PAGE_BYTES
        )
        wanted = self.pages[WANTED, :, FIRST_HEAD : FIRST_HEAD + RUN_PAGES]
        digests = [xxhash.xxh3_128_digest(p.tobytes()) for p in wanted.reshape(-1, PAGE_BYTES)]
        self.digests: NDArray[np.uint8] = (
            np.frombuffer(b"".join(digests), np.uint8)
            .reshape(len(WANTED), LAYERS, RUN_PAGES, 16)
            .copy()
        )

    def flip(self, block: int, layer: int, head: int) -> None:
        """Damage a page of this rank, or mend it again."""
        self.pages[WANTED[block], layer, FIRST_HEAD + head, 99] ^= 16


def compiled(slots: Slots, gates: Sequence[Gate]) -> Verification:
    return begin_verification(slots.runs, slots.digests, gates, num_threads=3)


def reference(slots: Slots, gates: Sequence[Gate]) -> Verification:
    return ReferenceVerification(slots.runs, slots.digests, gates)


Begin = Callable[[Slots, Sequence[Gate]], Verification]
both = pytest.mark.parametrize("begin", [compiled, reference])


@both
def test_whole_pages_are_found_whole(begin: Begin) -> None:
    """Whatever lies in other heads and in other slots."""
    slots = Slots()
    slots.pages[:, :, 0] = 0
    slots.pages[:, :, FIRST_HEAD + RUN_PAGES :] = 0
    slots.pages[[slot for slot in range(SLOTS) if slot not in WANTED]] = 0

    assert begin(slots, [open_gate(LAYERS)]).wait().tolist() == [True] * 4


@both
@pytest.mark.parametrize(("layer", "head"), [(0, 0), (2, 1), (LAYERS - 1, RUN_PAGES - 1)])
def test_a_flipped_bit_makes_its_block_bad_and_no_other(
    begin: Begin, layer: int, head: int
) -> None:
    """In the first page, the last one, or between."""
    slots = Slots()
    slots.flip(2, layer, head)

    assert begin(slots, [open_gate(3), open_gate(LAYERS)]).wait().tolist() == [
        True,
        True,
        False,
        True,
    ]


@both
def test_no_page_is_looked_at_before_its_gate_has_opened(begin: Begin) -> None:
    """Layers that are whole only just before their gate opens are whole."""
    slots = Slots()
    doors = [Door() for _ in range(LAYERS)]
    for layer in range(LAYERS):
        slots.flip(layer % 4, layer, 0)
    verification = begin(slots, [door.gate(layer + 1) for layer, door in enumerate(doors)])
    for layer, door in enumerate(doors):
        slots.flip(layer % 4, layer, 0)
        door.open()

    assert verification.wait().all()


@both
def test_what_is_changed_before_its_gate_opens_is_found(begin: Begin) -> None:
    """A stray writer was faster than the reader of the pages."""
    slots = Slots()
    first, second = Door(), Door()
    verification = begin(slots, [first.gate(2), second.gate(LAYERS)])
    first.open()
    slots.flip(1, LAYERS - 1, 2)
    second.open()

    assert verification.wait().tolist() == [True, False, True, True]
    assert verification.wait().tolist() == [True, False, True, True]


@both
def test_a_gate_may_open_nothing(begin: Begin) -> None:
    """It makes ready what later gates need."""
    slots, door = Slots(), Door()
    slots.flip(3, 0, 0)
    verification = begin(slots, [door.gate(0), open_gate(LAYERS)])
    slots.flip(3, 0, 0)
    door.open()

    assert verification.wait().all()


@both
def test_a_gate_that_fails_is_told_each_time(begin: Begin) -> None:
    """Nothing is known of any block then; the layers behind it are not waited for."""
    never = Door()
    verification = begin(Slots(), [open_gate(2), failing_gate(4), never.gate(LAYERS)])

    for _ in range(2):
        with pytest.raises(UnavailableError, match="failed with code 7"):
            verification.wait()


def test_a_gate_that_fails_leaves_no_block_good() -> None:
    """Also where somebody looks at the flags and not at the error."""
    slots, is_ok = Slots(), np.ones(4, np.bool_)
    running = _pages.begin_verify(*arguments(slots, [open_gate(5), failing_gate(LAYERS)], is_ok))

    assert _pages.end_verify(running) == 7
    assert not is_ok.any()


def test_no_thread_of_it_needs_the_interpreter() -> None:
    """An engine's thread that never gives up the interpreter's lock does not hold it up."""
    slots, door, last = Slots(), Door(), Door()
    slots.flip(2, LAYERS - 1, 0)
    is_ok = np.ones(4, np.bool_)
    gates = [door.gate(3), last.gate(LAYERS)]
    running = _pages.begin_verify(*arguments(slots, gates, is_ok))
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        door.open()
        last.open()
        flags = as_bytes(is_ok)
        is_seen = any(not flags[2] for _ in range(100_000_000))
    finally:
        sys.setswitchinterval(interval_s)

    assert is_seen
    assert _pages.end_verify(running) == 0
    assert is_ok.tolist() == [True, True, False, True]


def test_closed_layers_are_left_alone_while_open_ones_are_compared() -> None:
    """However many threads have nothing else to do meanwhile."""
    slots, door, is_ok = Slots(), Door(), np.ones(4, np.bool_)
    slots.flip(0, 0, 0)
    slots.flip(1, LAYERS - 1, 0)
    running = _pages.begin_verify(*arguments(slots, [open_gate(1), door.gate(LAYERS)], is_ok))
    flags = as_bytes(is_ok)
    while flags[0]:
        pass
    assert all(flags[1] for _ in range(300_000))
    slots.flip(1, LAYERS - 1, 0)
    door.open()

    assert _pages.end_verify(running) == 0
    assert is_ok.tolist() == [False, True, True, True]


def test_several_threads_may_wait() -> None:
    """Each is told the same."""
    slots, door = Slots(), Door()
    slots.flip(0, 0, 0)
    verification = compiled(slots, [door.gate(LAYERS)])
    found: list[list[bool]] = []
    threads = [
        threading.Thread(target=lambda: found.append(verification.wait().tolist()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    door.open()
    for thread in threads:
        thread.join()

    assert found == [[False, True, True, True]] * 3


def test_no_thread_outlives_it() -> None:
    """Waited for or not."""
    num_tasks = len(os.listdir("/proc/self/task"))
    for is_awaited in (True, False):
        verification = compiled(Slots(), [open_gate(LAYERS)])
        if is_awaited:
            verification.wait()
        del verification

    assert len(os.listdir("/proc/self/task")) == num_tasks


def test_many_pages_are_shared_out() -> None:
    """Enough for every thread to take several turns: each run is compared once, and rightly."""
    chance = np.random.default_rng(3)
    pages = chance.integers(0, 256, (60, 20, 4, 4096), np.uint8)
    flat = pages.reshape(-1, 4096)
    digests = np.frombuffer(
        b"".join(xxhash.xxh3_128_digest(page.tobytes()) for page in flat), np.uint8
    ).reshape(60, 20, 4, 16)
    bad = sorted(chance.choice(60, 9, replace=False).tolist())
    for block in bad:
        pages[block, chance.integers(20), chance.integers(4), chance.integers(4096)] ^= 1
    starts = np.array([pages[block].ctypes.data for block in range(60)], np.uint64)
    runs = Runs(starts, 20, 4 * 4096, 4, 4096)
    gates = [open_gate(end) for end in (1, 1, 7, 13, 20)]

    landed = begin_verification(runs, digests, gates, num_threads=16).wait()

    assert np.flatnonzero(~landed).tolist() == bad


def test_no_blocks() -> None:
    """No blocks are no work and no error."""
    runs = Runs(np.zeros(0, np.uint64), 2, 8192, 1, 8192)
    digests = np.zeros((0, 2, 1, 16), np.uint8)

    assert not len(begin_verification(runs, digests, [open_gate(2)], num_threads=2).wait())


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are compared in Python, with the same result."""
    monkeypatch.setitem(sys.modules, "kvkeep.transfer._pages", None)
    monkeypatch.delattr("kvkeep.transfer._pages", raising=False)
    slots = Slots()
    slots.flip(1, 1, 1)
    verification = compiled(slots, [open_gate(LAYERS)])

    assert isinstance(verification, ReferenceVerification)
    assert verification.wait().tolist() == [True, False, True, True]


def as_bytes(is_ok: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Flags that can be looked at while they change.

    numpy 2.3 reads a bool twice when it makes an object of it: between the two it may change, and
    the wrong one of ``np.True_`` and ``np.False_`` is counted (numpy issue 30389). In the end one
    is freed, which aborts the interpreter.
    """
    return is_ok.view(np.uint8)


def arguments(slots: Slots, gates: Sequence[Gate], is_ok: NDArray[np.bool_]) -> Any:
    """What the extension takes."""
    rows = np.array([dataclasses.astuple(gate) for gate in gates], np.uint64)
    runs = slots.runs
    numbers = (runs.num_layers, runs.layer_stride_bytes, runs.run_pages, runs.page_bytes)
    return runs.starts, *numbers, slots.digests, is_ok, rows, 3, cpu_mask(None)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"page_bytes": 0}, "page_bytes must be 1 to"),
        ({"num_layers": 0}, "must be at least 1"),
        ({"run_pages": 0}, "must be at least 1"),
        ({"layer_stride_bytes": 0}, "must be at least 1"),
        ({"starts": np.zeros(4, np.int64)}, "starts must be uint64"),
        ({"starts": np.zeros(8, np.uint64)[::2]}, "starts must be uint64"),
        ({"starts": np.zeros(3, np.uint64)}, "digests must be uint8"),
        ({"num_layers": 5}, "digests must be uint8"),
    ],
)
def test_runs_that_do_not_fit_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    """In a sentence, before a page was looked at."""
    slots = Slots()
    runs = dataclasses.replace(slots.runs, **wrong)

    with pytest.raises(ValueError, match=sentence):
        begin_verification(runs, slots.digests, [open_gate(LAYERS)], num_threads=1)


@pytest.mark.parametrize(
    "gates",
    [
        [],
        [open_gate(LAYERS - 1)],
        [open_gate(LAYERS + 1)],
        [open_gate(4), open_gate(2), open_gate(LAYERS)],
        [Gate(0, 0, LAYERS)],
    ],
)
def test_gates_that_do_not_fit_are_refused(gates: list[Gate]) -> None:
    """Out of order, short of the last layer or beyond it, or no function at all."""
    slots = Slots()

    with pytest.raises(ValueError, match="gates must be functions in the order"):
        begin_verification(slots.runs, slots.digests, gates, num_threads=1)
    with pytest.raises(ValueError, match="gates out of order"):
        _pages.begin_verify(*arguments(slots, gates, np.ones(4, np.bool_)))


@pytest.mark.parametrize("num_threads", [0, 17])
def test_threads_out_of_range_are_refused(num_threads: int) -> None:
    """The extension holds 16 handles."""
    slots = Slots()

    with pytest.raises(ValueError, match="num_threads must be 1 to 16"):
        begin_verification(slots.runs, slots.digests, [open_gate(LAYERS)], num_threads=num_threads)


@pytest.mark.parametrize("place", [0, 5, 6])
def test_the_extension_reads_beyond_no_array(place: int) -> None:
    """Should what checks the arrays slip: one that is too short is refused there, too."""
    given = list(arguments(Slots(), [open_gate(LAYERS)], np.ones(4, np.bool_)))
    given[place] = given[place][:-1].copy()

    with pytest.raises(ValueError, match="arrays of different lengths"):
        _pages.begin_verify(*given)
