"""A store with tiers below its pool, and hands to empty them."""

from collections.abc import Sequence

from kvkeep.testing.fake_kv import FakeStore, Faults, KvBlock
from kvkeep.validate.arms import LowerTiers

POOL = "pool"


class TieredStore(FakeStore):
    """Keeps each block in a pool and in every tier below; reads the nearest one that has it."""

    def __init__(self, *names: str, wrong: str | None = None) -> None:
        super().__init__()
        self.tiers: dict[str, dict[bytes, KvBlock]] = {name: {} for name in names}
        self.reads = dict.fromkeys(names, 0)
        self.wrong = wrong
        """The place from which blocks arrive with another bit."""

    def store(self, key: bytes, block: KvBlock) -> None:
        super().store(key, block)
        for tier in self.tiers.values():
            tier.setdefault(key, block)

    def load(self, key: bytes, faults: Faults) -> KvBlock | None:
        place = POOL
        if key not in self.blocks:
            found = [name for name, tier in self.tiers.items() if key in tier]
            if not found:
                return None
            place = found[0]
            self.blocks[key] = self.tiers[place][key]
            self.reads[place] += 1
        block = super().load(key, faults)
        if block is None or place != self.wrong:
            return block
        return KvBlock(block.words, bytes([block.bits[0] ^ 1]) + block.bits[1:])


class FakeTiers(LowerTiers):
    """Empties a `TieredStore`, whose tier ``disk`` is on this machine and whose others are not."""

    def __init__(self, store: TieredStore) -> None:
        self.disks = tuple(name for name in store.tiers if name == "disk")
        self.remotes = tuple(name for name in store.tiers if name != "disk")
        self._store = store

    async def settle(self) -> None:
        """Nothing is ever under way."""

    async def clear(self, names: Sequence[str]) -> None:
        for name in names:
            (self._store.blocks if name == POOL else self._store.tiers[name]).clear()

    async def num_read(self, names: Sequence[str]) -> int:
        return sum(self._store.reads[name] for name in names)
