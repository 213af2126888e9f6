"""The disk tier keeps the contract, around the page cache and through it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.testing.tier_contract import NUM_VALUES, VALUE_BYTES, TierContract
from kvkeep.tiers.base import Gauges, Lists, Probes, Tier
from kvkeep.tiers.disk.tier import DiskOptions, DiskTier

CAPACITY_BYTES = (NUM_VALUES + 8) * (VALUE_BYTES + 8192)
"""A few slots more than values: writers at once hold some."""
SEGMENT_BYTES = 4 << 20


class TestDiskTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        options = DiskOptions(segment_bytes=SEGMENT_BYTES)
        tier = DiskTier(tmp_path / "tier", CAPACITY_BYTES, VALUE_BYTES, options=options)
        yield tier
        tier.close()

    def test_it_tells_what_it_knows(self, tier: Tier) -> None:
        """It is asked before it is read, listed, and counted."""
        assert isinstance(tier, Probes)
        assert isinstance(tier, Lists)
        assert isinstance(tier, Gauges)


class TestBufferedDiskTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        options = DiskOptions(segment_bytes=SEGMENT_BYTES, may_be_direct=False)
        tier = DiskTier(tmp_path / "tier", CAPACITY_BYTES, VALUE_BYTES, options=options)
        yield tier
        tier.close()
