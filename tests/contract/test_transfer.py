"""Every copier keeps the contract. The compiled one has to be there: see packages.txt."""

import pytest

from kvkeep.testing.transfer_contract import TransferContract
from kvkeep.transfer.base import PageCopier
from kvkeep.transfer.host_copy import CompiledCopier, ReferenceCopier


class TestReferenceCopier(TransferContract):
    @pytest.fixture
    def copier(self) -> PageCopier:
        return ReferenceCopier()


class TestCompiledCopier(TransferContract):
    @pytest.fixture
    def copier(self) -> PageCopier:
        return CompiledCopier()


class TestCompiledCopierOnSixteenThreads(TransferContract):
    @pytest.fixture
    def copier(self) -> PageCopier:
        return CompiledCopier(num_threads=16)
