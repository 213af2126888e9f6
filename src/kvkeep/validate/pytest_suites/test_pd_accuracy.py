"""Accuracy of a hand-off from prefill to decode."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_answers_are_those_of_one_engine(check_suite: Callable[[str], object]) -> None:
    """Through the router every answer is that of a single engine, and prompts are handed over."""
    check_suite("pd-accuracy")
