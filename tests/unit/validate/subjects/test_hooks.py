"""What a person may say of a reset and of counters."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.validate.subjects.hooks import Outside, parse_outside, parse_reset


@pytest.mark.parametrize(
    ("text", "method", "address"),
    [
        ("POST /reset", "POST", "/reset"),
        ("delete http://127.0.0.1:9/cache", "DELETE", "http://127.0.0.1:9/cache"),
        ("/reset?external=false", "POST", "/reset?external=false"),
    ],
)
def test_a_reset_is_a_method_and_an_address(text: str, method: str, address: str) -> None:
    """A path of the engine or a whole address, posted to unless another method stands before."""
    reset = parse_reset(text)

    assert (reset.method, reset.address) == (method, address)
    assert "--reset" in reset.otherwise


@pytest.mark.parametrize(
    "text", ["", "BREW /pot", "reset", "POST reset", "POST ftp://a/b", "A B C"]
)
def test_what_is_no_request_is_refused(text: str) -> None:
    """One sentence shows how a request is written."""
    with pytest.raises(InputError, match="POST /reset_prefix_cache"):
        parse_reset(text)


def test_counters_are_names_an_address_and_a_size() -> None:
    """Names are separated by commas; what is not said is the engine's page, a token each."""
    assert parse_outside("a_total, b", None, None) == Outside(("a_total", "b"), "/metrics", 1)
    assert parse_outside("a", "http://h:1/m", 32) == Outside(("a",), "http://h:1/m", 32)


@pytest.mark.parametrize(
    ("counters", "address", "said"),
    [(None, "/metrics", "name the counters too"), ("a", "metrics", "takes a path or an address")],
)
def test_counters_that_lead_nowhere_are_refused(
    counters: str | None, address: str, said: str
) -> None:
    """An address without names, or one that is none."""
    with pytest.raises(InputError, match=said):
        parse_outside(counters, address, None)
