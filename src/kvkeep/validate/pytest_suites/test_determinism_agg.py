"""Determinism on one engine that prefills and decodes."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.kvbm, pytest.mark.e2e, pytest.mark.slow, pytest.mark.nightly]


def test_determinism_with_cache_reset(check_suite: Callable[[str], object]) -> None:
    """Answers stay the same across a reset of the engine's cache."""
    check_suite("determinism")


def test_concurrent_determinism_with_ifeval(check_suite: Callable[[str], object]) -> None:
    """So do those of several requests at once, also beside a flood that evicts."""
    check_suite("determinism-concurrent")
