"""Each wrapper around memory keeps the contract, alone and in the order of decision 0013."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.testing.tier_contract import NUM_VALUES, VALUE_BYTES, TierContract
from kvkeep.tiers.base import Tier
from kvkeep.tiers.faulty import FaultyTier
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.pool_tier import SharedMemoryTier
from kvkeep.tiers.wrappers.codecs import ZstdCodec
from kvkeep.tiers.wrappers.compressed import CompressedTier
from kvkeep.tiers.wrappers.encrypted import EncryptedTier
from kvkeep.tiers.wrappers.key_ring import KeyRing
from kvkeep.tiers.wrappers.metered import MeteredTier
from kvkeep.tiers.wrappers.verified import VerifiedTier

KEYS = KeyRing([b"k" * 32])


def memory() -> MemoryTier:
    """A tier inside, with room for what wrappers add."""
    overhead = (
        VerifiedTier.overhead_bytes + EncryptedTier.overhead_bytes + CompressedTier.overhead_bytes
    )
    return MemoryTier(NUM_VALUES * (VALUE_BYTES + overhead))


class TestVerifiedTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return VerifiedTier(memory())


class TestMeteredTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return MeteredTier(memory())


class TestEncryptedTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return EncryptedTier(memory(), KEYS)


class TestCompressedTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return CompressedTier(memory(), ZstdCodec())


class TestFaultyTierThatIsWell(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return FaultyTier(memory(), {}, seed=1)


class TestAllWrappers(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        encrypted = EncryptedTier(memory(), KEYS)
        return MeteredTier(VerifiedTier(CompressedTier(encrypted, ZstdCodec())))


class TestSharedMemoryTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        pool_bytes = (4 << 20) + (NUM_VALUES + 4) * (VALUE_BYTES + 512)
        tier = SharedMemoryTier(tmp_path / "pool", pool_bytes, VALUE_BYTES)
        yield tier
        tier.close()
