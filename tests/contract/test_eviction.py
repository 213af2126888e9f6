"""Every eviction policy keeps the contract."""

import pytest

from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.testing.eviction_contract import EvictionContract


class TestLruPolicy(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return LruPolicy()
