"""Questions about long documents."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.nightly]


def test_documents_come_back_sooner(check_suite: Callable[[str], object]) -> None:
    """Documents' KV comes back right, and sooner than computing it."""
    check_suite("long-doc-qa")
