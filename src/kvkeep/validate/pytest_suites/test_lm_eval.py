"""A graded task through lm-evaluation-harness, twice."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.nightly]


def test_reuse_changes_no_answer(check_suite: Callable[[str], object]) -> None:
    """Item by item the second run, out of the cache, answers as the first one did."""
    check_suite("lm-eval")
