"""Every eviction policy keeps the contract."""

import pytest

from kvkeep.core.eviction.base import EvictionPolicy
from kvkeep.core.eviction.lru import LruPolicy
from kvkeep.core.eviction.s3fifo import S3FifoPolicy
from kvkeep.testing.eviction_contract import EvictionContract


class TestLruPolicy(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return LruPolicy()


class TestS3FifoPolicy(EvictionContract):
    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return S3FifoPolicy(20)
