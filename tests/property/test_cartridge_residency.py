"""The resident set against plain lists: any calls, and both agree on who is there and why."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvkeep.cartridges.residency.resident_set import ResidentSet
from kvkeep.model.errors import CapacityError

NAMES = st.sampled_from("abcde")
SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 11}
BUDGET = 10


@dataclass
class Kept:
    """One cartridge of the model."""

    is_resident: bool = False
    is_pinned: bool = False
    references: list[int] = field(default_factory=list)

    @property
    def may_go(self) -> bool:
        return self.is_resident and not self.is_pinned and not self.references


class ResidentSetAgainstLists(RuleBasedStateMachine):
    """``order`` is the model: names by last use, and what is known of each."""

    def __init__(self) -> None:
        super().__init__()
        self.resident = ResidentSet(BUDGET)
        self.order: list[str] = []
        self.kept: dict[str, Kept] = {}
        self.promoted = self.evicted = self.acquired = 0

    def room_for(self, name: str) -> list[str] | None:
        """Who has to go, or None if that can't be."""
        leaving: list[str] = []
        while sum(SIZES[each] for each in self.order if each not in leaving) + SIZES[name] > BUDGET:
            idle = [each for each in self.order if self.kept[each].may_go and each not in leaving]
            if not idle:
                return None
            leaving.append(idle[0])
        return leaving

    def leave(self, name: str) -> None:
        self.order.remove(name)
        del self.kept[name]
        self.evicted += 1

    def come(self, name: str, leaving: list[str]) -> None:
        for each in leaving:
            self.leave(each)
        self.order.append(name)
        self.kept[name] = Kept()

    @rule(name=NAMES)
    def acquire(self, name: str) -> None:
        is_there = name in self.kept
        leaving = [] if is_there else self.room_for(name)
        try:
            acquired = self.resident.acquire(name, SIZES[name])
        except CapacityError:
            assert leaving is None
            return
        assert leaving is not None
        assert list(acquired.evicted) == leaving
        assert acquired.is_load_due is not is_there
        if not is_there:
            self.come(name, leaving)
        self.order.remove(name)
        self.order.append(name)
        assert acquired.is_resident is self.kept[name].is_resident
        self.kept[name].references.append(acquired.reference)
        self.acquired += 1

    @rule(name=NAMES)
    def prefetch(self, name: str) -> None:
        is_there = name in self.kept
        leaving = [] if is_there else self.room_for(name)
        prefetched = self.resident.prefetch(name, SIZES[name])
        assert (prefetched is None) is (leaving is None)
        if prefetched is None or leaving is None:
            return
        assert prefetched.is_load_due is not is_there
        assert list(prefetched.evicted) == leaving
        if not is_there:
            self.come(name, leaving)

    @rule(name=NAMES, works=st.booleans())
    def end_load(self, name: str, works: bool) -> None:
        if name not in self.kept or self.kept[name].is_resident:
            return
        if works:
            self.resident.loaded(name)
            self.kept[name].is_resident = True
            self.order.remove(name)
            self.order.append(name)
            self.promoted += 1
        else:
            assert self.resident.failed(name) == len(self.kept[name].references)
            self.order.remove(name)
            del self.kept[name]

    @rule(name=NAMES, nth=st.integers(0, 2))
    def release(self, name: str, nth: int) -> None:
        references = self.kept[name].references if name in self.kept else []
        if nth < len(references):
            assert self.resident.release(name, references.pop(nth))
        else:
            assert not self.resident.release(name, -1)

    @rule(name=NAMES, pins=st.booleans())
    def pin(self, name: str, pins: bool) -> None:
        told = self.resident.pin(name) if pins else self.resident.unpin(name)
        assert told is (name in self.kept)
        if told:
            self.kept[name].is_pinned = pins

    @rule(name=NAMES, force=st.booleans())
    def evict(self, name: str, force: bool) -> None:
        kept = self.kept.get(name)
        goes = kept is not None and kept.is_resident and (force or kept.may_go)
        assert self.resident.evict(name, force=force) is goes
        if goes:
            self.leave(name)

    @invariant()
    def both_agree(self) -> None:
        resident, metrics = self.resident, self.resident.metrics
        resident.check()
        there = [name for name in self.order if self.kept[name].is_resident]
        assert resident.resident_ids() == there
        assert resident.resident_bytes == sum(SIZES[name] for name in there)
        assert resident.taken_bytes == sum(SIZES[name] for name in self.order) <= BUDGET
        assert (metrics.promoted, metrics.evicted) == (self.promoted, self.evicted)
        assert metrics.promoted - metrics.evicted == len(there)
        assert metrics.hits + metrics.misses == self.acquired
        for name, kept in self.kept.items():
            assert resident.num_references(name) == len(kept.references)
            assert resident.is_pinned(name) is kept.is_pinned
            assert resident.is_loading(name) is not kept.is_resident


ResidentSetAgainstLists.TestCase.settings = settings(stateful_step_count=40)
TestResidentSetAgainstLists = ResidentSetAgainstLists.TestCase
