"""Every tier keeps the contract; those with a server have it in tests/integration."""

from collections.abc import Iterator

import pytest

from kvkeep.testing.tier_contract import NUM_VALUES, VALUE_BYTES, TierContract
from kvkeep.tiers.base import Tier
from kvkeep.tiers.memory import MemoryTier


class TestMemoryTier(TierContract):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = MemoryTier(NUM_VALUES * VALUE_BYTES)
        yield tier
        tier.close()
