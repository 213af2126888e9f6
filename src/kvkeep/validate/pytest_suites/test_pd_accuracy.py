"""Accuracy of a hand-off from prefill to decode."""

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.fleets
@pytest.mark.nightly
def test_pairs_of_all_sizes(check_suite: Callable[[str], object]) -> None:
    """So it is for every combination of sizes that the machine has room for."""
    check_suite("tp-sweep")


def test_answers_are_those_of_one_engine(check_suite: Callable[[str], object]) -> None:
    """Through the router every answer is that of a single engine, and prompts are handed over."""
    check_suite("pd-accuracy")
