"""The promises of core/node.py told a second time, naively: what tests compare NodeState with.

The model knows a cell per slot: listed (being written or ready) or not, who may still write it and
who reads it. One rule stands for all the bookkeeping of the core: a cell that is not listed, that
nobody reads and that nobody may still be writing, is free.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvkeep.model.ids import BlockKey, Holder


@dataclass
class Cell:
    """What the model knows of a slot."""

    key: BlockKey | None = None
    """None when nothing is listed under this slot."""
    is_ready: bool = False
    committed: set[int] = field(default_factory=set)
    readers: list[int] = field(default_factory=list)
    """Read leases, one entry per pin."""
    writers: dict[object, tuple[Holder, frozenset[int]]] = field(default_factory=dict)
    """Holder and heads by lease, as long as the writer is not proven quiet."""
    expires_s: float = 0.0
    """When a listed block that is incomplete and that nobody writes is given up."""

    @property
    def is_free(self) -> bool:
        """Whether it may be given to any block."""
        return self.key is None and not self.readers and not self.writers

    @property
    def heads_on_the_way(self) -> set[int]:
        """Heads that somebody writes, or may still be writing."""
        return {head for _, heads in self.writers.values() for head in heads}

    def unlist(self) -> None:
        """Take the block out of reach; readers and writers stay."""
        self.key, self.is_ready, self.committed = None, False, set()


@dataclass(frozen=True)
class Lease:
    """A lease as its holder sees it."""

    holder: Holder
    cells: Sequence[Cell]
    heads: frozenset[int]
    """Heads it covers of each block; none of a read lease."""
    deadline_s: float


class NaiveNode:
    """The promises of core/node.py, in dicts and lists, as slow as they come."""

    def __init__(self, num_slots: int, num_heads: int) -> None:
        self.all_heads = frozenset(range(num_heads))
        self.cells = {idx: Cell() for idx in range(num_slots)}
        self.reads: dict[int, Lease] = {}
        self.writes: dict[int, Lease] = {}
        self.lost: dict[int, Lease] = {}
        self.now_s = 0.0

    def find(self, key: BlockKey) -> Cell | None:
        """The cell under which a block is listed."""
        return next((cell for cell in self.cells.values() if cell.key == key), None)

    def readable(self, keys: Iterable[BlockKey]) -> list[int]:
        """Slots of the longest readable prefix."""
        found: list[int] = []
        for key in keys:
            ready = [idx for idx, cell in self.cells.items() if cell.key == key and cell.is_ready]
            if not ready:
                break
            found += ready
        return found

    def end_read(self, lease_id: int) -> None:
        """End a read lease."""
        for cell in self.reads.pop(lease_id).cells:
            cell.readers.remove(lease_id)

    def finish(self, lease_id: int, lease: Lease, is_stored: Sequence[bool]) -> int:
        """Take in the end of a write that counts; returns how many blocks it made readable."""
        num_ready = 0
        for cell, ok in zip(lease.cells, is_stored, strict=True):
            del cell.writers[lease_id]
            if cell.key is None:
                continue
            if ok:
                cell.committed |= lease.heads
                cell.expires_s = lease.deadline_s
                cell.is_ready = cell.committed == self.all_heads
                num_ready += cell.is_ready
            elif not cell.writers:
                cell.unlist()
        return num_ready

    def lose(self, lease_id: int) -> None:
        """End a write lease whose writer may go on."""
        lease = self.lost[lease_id] = self.writes.pop(lease_id)
        for cell in lease.cells:
            cell.unlist()

    def quiet(self, pid: int, before_session: int | None) -> None:
        """Take in the proof that a process writes nothing that it began in earlier sessions."""

        def is_over(holder: Holder) -> bool:
            is_earlier = before_session is None or holder.session_id < before_session
            return holder.pid == pid and is_earlier

        for lease_id in [id_ for id_, lease in self.writes.items() if is_over(lease.holder)]:
            lease = self.writes.pop(lease_id)
            self.finish(lease_id, lease, [False] * len(lease.cells))
        self.lost = {id_: lease for id_, lease in self.lost.items() if not is_over(lease.holder)}
        for cell in self.cells.values():
            cell.writers = {tag: who for tag, who in cell.writers.items() if not is_over(who[0])}

    def pass_time(self, now_s: float) -> None:
        """End what is overdue."""
        self.now_s = now_s
        for lease_id in [id_ for id_, lease in self.reads.items() if lease.deadline_s <= now_s]:
            self.end_read(lease_id)
        for lease_id in [id_ for id_, lease in self.writes.items() if lease.deadline_s <= now_s]:
            self.lose(lease_id)
        for cell in self.cells.values():
            is_abandoned = cell.key is not None and not cell.is_ready and not cell.writers
            if is_abandoned and cell.expires_s <= now_s:
                cell.unlist()
