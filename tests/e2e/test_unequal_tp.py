"""A prompt computed by engines of one tensor-parallel size and answered by those of another."""

from collections.abc import Iterator

import pytest

from tests.e2e.random_llama import make_random_llama
from tests.e2e.tp_fleets import Fleet, check_pair, check_swapped_head, running_fleet

# Eight processes load their libraries on two cores before anything is shown.
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One rank, and two ranks, with a model of random weights: nearly any token is as likely."""
    folder = tmp_path_factory.mktemp("tp")
    sizes = {"one": 1, "two": 2}
    with running_fleet(folder, str(make_random_llama()), sizes, 32) as found:
        yield found


@pytest.mark.parametrize(("prefill", "decode"), [("one", "two"), ("two", "one")])
def test_ranks_hold_what_others_wrote(fleet: Fleet, prefill: str, decode: str) -> None:
    """Heads split anew are equal to the bit, and answers as near as the sizes are to each other."""
    check_pair(fleet, prefill, decode)


@pytest.mark.parametrize(("prefill", "decode"), [("one", "two"), ("two", "one")])
def test_a_swapped_head_is_seen(fleet: Fleet, prefill: str, decode: str) -> None:
    """What the test above compares tells two heads of one layer from each other."""
    check_swapped_head(fleet, prefill, decode)
