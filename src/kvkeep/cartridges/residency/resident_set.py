"""A budget of bytes shared by cartridges: who stays, who has to go, and what was counted.

Pure: it decides and counts, and somebody else moves bytes. A cartridge comes and goes whole, for a
part of one serves nobody. What is used (it has references), pinned, or on its way is never evicted;
of the others the one whose last use is longest ago goes first.

    absent --acquire, prefetch--> loading --loaded--> resident --evict--> absent
                                     `------failed--------------------------^
"""

from collections import OrderedDict
from dataclasses import asdict, dataclass, field

from kvkeep.model.errors import CapacityError, InvariantError


@dataclass(slots=True)
class ResidencyMetrics:
    """Counters, which only grow.

    At any time ``promoted - evicted`` is how many are resident, and the same of the bytes; ``hits +
    misses`` is how often one was acquired.
    """

    hits: int = 0
    """Times at which a cartridge was acquired that was resident."""
    misses: int = 0
    """Times at which it was not: whoever acquired it waits until it is."""
    refused: int = 0
    """Times at which there was no room for one that was to be acquired."""
    promoted: int = 0
    """Times at which one became resident, prefetched ones among them."""
    prefetched: int = 0
    """Of these, loads that no request had asked for yet when they began."""
    evicted: int = 0
    """Times at which a resident one went, to make room or on request."""
    failed: int = 0
    """Loads of which nothing came."""
    bytes_promoted: int = 0
    bytes_evicted: int = 0

    def snapshot(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Acquired:
    """One reference to a cartridge; it ends with ``release``, once."""

    reference: int
    is_resident: bool
    """Whether it may be used at once; else after ``loaded``."""
    is_load_due: bool
    """Whether the caller has to load it, and say ``loaded`` or ``failed``; else another does."""
    evicted: tuple[str, ...] = ()
    """What has to leave before that, least recently used first."""


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What a prefetch leads to."""

    is_load_due: bool
    """As in ``Acquired``; False: it is there, or on its way."""
    evicted: tuple[str, ...] = ()


@dataclass(slots=True)
class _Entry:
    num_bytes: int
    is_resident: bool = False
    is_pinned: bool = False
    is_prefetch: bool = False
    references: set[int] = field(default_factory=set)

    @property
    def is_evictable(self) -> bool:
        return self.is_resident and not self.is_pinned and not self.references


class ResidentSet:
    """The cartridges of one memory. Not for several threads at once: whoever owns it locks it."""

    def __init__(self, bytes_max: int) -> None:
        """Hold nothing: no cartridge is there before somebody asks for it.

        Args:
            bytes_max: Of everything resident or on its way, together.
        """
        assert bytes_max >= 0
        self.bytes_max = bytes_max
        self.metrics = ResidencyMetrics()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """Last used last."""
        self._taken_bytes = 0
        self._next_reference = 1

    # ---- Asking

    def is_resident(self, cartridge_id: str) -> bool:
        """Whether it may be used at once."""
        entry = self._entries.get(cartridge_id)
        return entry is not None and entry.is_resident

    def is_loading(self, cartridge_id: str) -> bool:
        """Whether it is on its way."""
        entry = self._entries.get(cartridge_id)
        return entry is not None and not entry.is_resident

    def num_references(self, cartridge_id: str) -> int:
        """How many use it; 0 also if it is absent."""
        entry = self._entries.get(cartridge_id)
        return 0 if entry is None else len(entry.references)

    def is_pinned(self, cartridge_id: str) -> bool:
        """Whether it stays until it is unpinned."""
        entry = self._entries.get(cartridge_id)
        return entry is not None and entry.is_pinned

    def resident_ids(self) -> list[str]:
        """All that are resident, least recently used first."""
        return [name for name, entry in self._entries.items() if entry.is_resident]

    @property
    def resident_bytes(self) -> int:
        """Of all that are resident."""
        return sum(entry.num_bytes for entry in self._entries.values() if entry.is_resident)

    @property
    def taken_bytes(self) -> int:
        """Of all that are resident or on their way; at most ``bytes_max``."""
        return self._taken_bytes

    # ---- Coming

    def acquire(self, cartridge_id: str, num_bytes: int) -> Acquired:
        """Refer to a cartridge, so that it stays; it is to be loaded if it is absent.

        Args:
            cartridge_id: Which.
            num_bytes: How large it is; counts if it is absent.

        Raises:
            CapacityError: There is no room for it; nothing was changed.
        """
        evicted: tuple[str, ...] = ()
        entry = self._entries.get(cartridge_id)
        is_new = entry is None
        if entry is None:
            try:
                evicted = self._make_room(cartridge_id, num_bytes)
            except CapacityError:
                self.metrics.refused += 1
                raise
            entry = self._begin(cartridge_id, num_bytes)
        self._entries.move_to_end(cartridge_id)
        reference, self._next_reference = self._next_reference, self._next_reference + 1
        entry.references.add(reference)
        if entry.is_resident:
            self.metrics.hits += 1
        else:
            self.metrics.misses += 1
        return Acquired(reference, entry.is_resident, is_new, evicted)

    def prefetch(self, cartridge_id: str, num_bytes: int) -> Prefetched | None:
        """Have a cartridge loaded before somebody refers to it; None if there is no room.

        It is refused, never forced in: nothing that is used or pinned goes for it.
        """
        if cartridge_id in self._entries:
            return Prefetched(is_load_due=False)
        try:
            evicted = self._make_room(cartridge_id, num_bytes)
        except CapacityError:
            return None
        self._begin(cartridge_id, num_bytes).is_prefetch = True
        return Prefetched(is_load_due=True, evicted=evicted)

    def loaded(self, cartridge_id: str) -> None:
        """A load that was due is done: it may be used.

        Raises:
            InvariantError: None was under way.
        """
        entry = self._loading(cartridge_id)
        entry.is_resident = True
        self._entries.move_to_end(cartridge_id)
        self.metrics.promoted += 1
        self.metrics.prefetched += entry.is_prefetch
        self.metrics.bytes_promoted += entry.num_bytes

    def failed(self, cartridge_id: str) -> int:
        """Nothing came of a load that was due; returns how many references end with it.

        Raises:
            InvariantError: None was under way.
        """
        entry = self._loading(cartridge_id)
        self._forget(cartridge_id)
        self.metrics.failed += 1
        return len(entry.references)

    # ---- Staying and going

    def release(self, cartridge_id: str, reference: int) -> bool:
        """End a reference; whether there was one: twice is once, and never below none.

        What nobody refers to stays until its room is needed.
        """
        entry = self._entries.get(cartridge_id)
        if entry is None or reference not in entry.references:
            return False
        entry.references.discard(reference)
        return True

    def pin(self, cartridge_id: str) -> bool:
        """Keep what is there or on its way until it is unpinned; False if it is absent."""
        return self._set_pinned(cartridge_id, True)

    def unpin(self, cartridge_id: str) -> bool:
        """Undo ``pin``; False if it is absent."""
        return self._set_pinned(cartridge_id, False)

    def evict(self, cartridge_id: str, *, force: bool = False) -> bool:
        """Let a resident cartridge go; whether it went.

        Args:
            cartridge_id: Which.
            force: Even if it is pinned or used: its references end.
        """
        entry = self._entries.get(cartridge_id)
        if entry is None or not entry.is_resident or not (force or entry.is_evictable):
            return False
        self._evict(cartridge_id)
        return True

    def check(self) -> None:
        """Compare what was counted with what is there.

        Raises:
            InvariantError: They contradict each other.
        """
        resident = [entry for entry in self._entries.values() if entry.is_resident]
        metrics = self.metrics
        sums = {
            "promoted - evicted": (metrics.promoted - metrics.evicted, len(resident)),
            "bytes": (metrics.bytes_promoted - metrics.bytes_evicted, self.resident_bytes),
            "taken": (self._taken_bytes, sum(each.num_bytes for each in self._entries.values())),
        }
        wrong = [
            f"{name} is {told}, not {true}" for name, (told, true) in sums.items() if told != true
        ]
        if self._taken_bytes > self.bytes_max:
            wrong.append(f"{self._taken_bytes} of {self.bytes_max} bytes are taken")
        if wrong:
            raise InvariantError(f"resident cartridges are not as counted: {', '.join(wrong)}")

    # ---- Inside

    def _make_room(self, cartridge_id: str, num_bytes: int) -> tuple[str, ...]:
        """Evict what has to go, or nothing at all."""
        if num_bytes > self.bytes_max:
            raise CapacityError(
                f"cartridge {cartridge_id} has {num_bytes} bytes and the budget is "
                f"{self.bytes_max}: it will never fit, raise the budget"
            )
        missing = self._taken_bytes + num_bytes - self.bytes_max
        leaving = []
        for name, entry in self._entries.items():
            if missing <= 0:
                break
            if entry.is_evictable:
                leaving.append(name)
                missing -= entry.num_bytes
        if missing > 0:
            raise CapacityError(
                f"cartridge {cartridge_id} cannot fit: {self._taken_bytes} of {self.bytes_max} "
                "bytes are taken, by cartridges that are used or pinned: wait, or raise the budget"
            )
        for name in leaving:
            self._evict(name)
        return tuple(leaving)

    def _begin(self, cartridge_id: str, num_bytes: int) -> _Entry:
        entry = self._entries[cartridge_id] = _Entry(num_bytes)
        self._taken_bytes += num_bytes
        return entry

    def _loading(self, cartridge_id: str) -> _Entry:
        entry = self._entries.get(cartridge_id)
        if entry is None or entry.is_resident:
            raise InvariantError(f"cartridge {cartridge_id} was not being loaded")
        return entry

    def _evict(self, cartridge_id: str) -> None:
        entry = self._forget(cartridge_id)
        self.metrics.evicted += 1
        self.metrics.bytes_evicted += entry.num_bytes

    def _forget(self, cartridge_id: str) -> _Entry:
        entry = self._entries.pop(cartridge_id)
        self._taken_bytes -= entry.num_bytes
        return entry

    def _set_pinned(self, cartridge_id: str, is_pinned: bool) -> bool:
        entry = self._entries.get(cartridge_id)
        if entry is not None:
            entry.is_pinned = is_pinned
        return entry is not None
