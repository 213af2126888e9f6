"""Time for nightly runs, which try far more."""

from pathlib import Path

import pytest

from tests.property.fuzz.damage import DEPTH

NIGHTLY_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of this folder take as long as their number of examples asks for."""
    if DEPTH > 1:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.timeout(NIGHTLY_TIMEOUT_S))
