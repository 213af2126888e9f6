"""What the tests of movement share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.daemon.movement.grounds import Grounds


@pytest.fixture
async def grounds(tmp_path: Path) -> AsyncIterator[Grounds]:
    """A pool and a tier."""
    made = Grounds(tmp_path)
    yield made
    made.close()
