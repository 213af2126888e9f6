"""The registry against a dict: any calls, and it has what the dict has, and no other file."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvkeep.cartridges.registry import FILES, Registry
from kvkeep.model.errors import CapacityError, InputError, RefusedError
from tests.unit.cartridges.made import contents, draft

NAMES = st.sampled_from("abc")
TOPICS = st.sampled_from(["ships", "whales", ""])
SEEDS = st.integers(0, 3)
KV = {num_layers: contents(num_layers, shape=(1, 1, 1)) for num_layers in (1, 2, 3)}
LAYER_BYTES = 8


@dataclass
class Kept:
    """One cartridge of the model."""

    num_layers: int
    topic: str
    source: str
    is_pinned: bool


class RegistryAgainstADict(RuleBasedStateMachine):
    """Two registries of one folder take turns, as two processes do."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.registries = [Registry(Path(self.folder.name)) for _ in range(2)]
        self.model: dict[str, Kept] = {}
        self.budget: int | None = None

    def teardown(self) -> None:
        for registry in self.registries:
            registry.close()
        self.folder.cleanup()

    @property
    def registry(self) -> Registry:
        """The other one than the last time."""
        self.registries.reverse()
        return self.registries[0]

    def fits(self, changed: dict[str, Kept], budget: int | None) -> bool:
        pinned = sum(kept.num_layers * LAYER_BYTES for kept in changed.values() if kept.is_pinned)
        return budget is None or pinned <= budget

    @rule(name=NAMES, num_layers=st.sampled_from([1, 2, 3]), topic=TOPICS, seed=SEEDS,
          pins=st.booleans())  # fmt: skip
    def register(self, name: str, num_layers: int, topic: str, seed: int, pins: bool) -> None:
        was_pinned = name in self.model and self.model[name].is_pinned
        kept = Kept(num_layers, topic, str(seed), pins or was_pinned)
        said = draft(name, labels={"topic": topic} if topic else {}, source=str(seed))
        fits = self.fits({**self.model, name: kept}, self.budget)
        try:
            entry = self.registry.register_contents(said, KV[num_layers], pins=pins)
        except CapacityError:
            assert not fits
            return
        assert fits
        assert entry.is_pinned == kept.is_pinned
        self.model[name] = kept

    @rule(name=NAMES, force=st.booleans())
    def remove(self, name: str, force: bool) -> None:
        kept = self.model.get(name)
        try:
            was_there = self.registry.remove(name, force=force)
        except RefusedError:
            assert kept is not None
            assert kept.is_pinned
            assert not force
            return
        assert was_there == (kept is not None)
        assert force or kept is None or not kept.is_pinned
        self.model.pop(name, None)

    @rule(name=NAMES, pins=st.booleans())
    def pin(self, name: str, pins: bool) -> None:
        changed = dict(self.model)
        if name in changed:
            kept = changed[name]
            changed[name] = Kept(kept.num_layers, kept.topic, kept.source, pins)
        try:
            (self.registry.pin if pins else self.registry.unpin)(name)
        except InputError:
            assert name not in self.model
            return
        except CapacityError:
            assert not self.fits(changed, self.budget)
            return
        assert name in self.model
        self.model = changed

    @rule(layers=st.sampled_from([None, 0, 2, 5]))
    def set_budget(self, layers: int | None) -> None:
        bytes_max = None if layers is None else layers * LAYER_BYTES
        try:
            self.registry.set_budget("host", bytes_max)
        except CapacityError:
            assert not self.fits(self.model, bytes_max)
            return
        assert self.fits(self.model, bytes_max)
        self.budget = bytes_max

    @rule(topic=TOPICS)
    def find_by_label(self, topic: str) -> None:
        found = [each.cartridge_id for each in self.registry.list_entries(label=("topic", topic))]
        wanted = sorted(name for name, kept in self.model.items() if topic and kept.topic == topic)
        assert found == wanted

    @invariant()
    def it_has_what_the_dict_has(self) -> None:
        registry = self.registry
        entries = {entry.cartridge_id: entry for entry in registry.list_entries()}
        assert {
            name: Kept(
                entry.manifest.num_layers,
                entry.manifest.labels.get("topic", ""),
                entry.manifest.source,
                entry.is_pinned,
            )
            for name, entry in entries.items()
        } == self.model
        assert registry.count() == len(self.model)
        pinned = [kept.num_layers for kept in self.model.values() if kept.is_pinned]
        assert registry.pinned_bytes() == sum(pinned) * LAYER_BYTES
        assert registry.budget("host") == self.budget

    @invariant()
    def no_file_is_left_over(self) -> None:
        named = {entry.path for entry in self.registry.list_entries()}
        assert set((Path(self.folder.name) / FILES).iterdir()) == named


TestRegistry = RegistryAgainstADict.TestCase
TestRegistry.settings = settings(max_examples=15, stateful_step_count=12)
