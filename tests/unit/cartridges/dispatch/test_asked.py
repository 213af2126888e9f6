"""What requests say, wherever they say it."""

from typing import Any

import pytest

from kvkeep.cartridges.dispatch.asked import (
    EXTRA_BODY,
    PARAMS,
    VALUE_CHARS_MAX,
    XARGS,
    of_body,
    of_extra_args,
)
from kvkeep.model.errors import InputError

ID = "cartridge_id"


def test_an_engine_s_request_says_it_on_top() -> None:
    """What stands in extra_args itself is read."""
    assert of_extra_args({ID: "patient_00"}).find(ID) == "patient_00"


def test_an_engine_s_request_says_it_in_the_transfer_parameters() -> None:
    """What stands in kv_transfer_params inside extra_args is read."""
    assert of_extra_args({PARAMS: {ID: "patient_01"}}).find(ID) == "patient_01"


def test_the_top_comes_first() -> None:
    """Said twice, the outer one counts."""
    assert of_extra_args({ID: "top", PARAMS: {ID: "nested"}}).find(ID) == "top"


@pytest.mark.parametrize("extra_args", [None, {}, [], "text", {PARAMS: None}, {PARAMS: "text"}])
def test_nothing_said_is_nothing(extra_args: object) -> None:
    """A request without parameters, whatever stands in their place, names no cartridge."""
    assert of_extra_args(extra_args).find(ID) is None


def test_a_number_is_taken_as_it_is_written() -> None:
    """An id of digits may come as a number."""
    assert of_extra_args({ID: 42}).find(ID) == "42"


def test_null_is_as_good_as_nothing() -> None:
    """A null on top does not hide what stands below."""
    assert of_extra_args({ID: None, PARAMS: {ID: "b"}}).find(ID) == "b"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "must be one text"),
        (1.5, "must be one text"),
        (["a"], "must be one text"),
        ({"a": 1}, "must be one text"),
        ("", "is empty"),
        ("x" * (VALUE_CHARS_MAX + 1), "at most"),
    ],
)
def test_what_can_t_be_a_name_is_refused(value: object, said: str) -> None:
    """The sentence names the field and what to write."""
    with pytest.raises(InputError, match=said) as caught:
        of_extra_args({ID: value}).find(ID)
    assert str(caught.value).startswith(ID)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({PARAMS: {ID: "a"}}, "a"),
        ({EXTRA_BODY: {PARAMS: {ID: "a"}}}, "a"),
        ({XARGS: {ID: "a"}}, "a"),
        ({EXTRA_BODY: {XARGS: {ID: "a"}}}, "a"),
        ({PARAMS: {ID: "a"}, EXTRA_BODY: {PARAMS: {ID: "b"}}}, "a"),
        ({XARGS: {ID: "a"}, PARAMS: {ID: "b"}}, "a"),
        ({PARAMS: {}, EXTRA_BODY: {PARAMS: {ID: "b"}}}, "b"),
        ({ID: "a"}, None),
        ({EXTRA_BODY: {ID: "a"}}, None),
        ({EXTRA_BODY: "text", PARAMS: [1]}, None),
    ],
)
def test_a_body_says_it_at_its_top_or_in_extra_body(
    body: dict[str, Any], found: str | None
) -> None:
    """The spelling of OpenAI's client counts in raw JSON too, after the top level."""
    assert of_body(body).find(ID) == found


def test_an_engine_would_see_the_same() -> None:
    """A body's top level says what vLLM would make extra_args of."""
    body = {XARGS: {"topic": "ships"}, PARAMS: {ID: "a"}}
    extra_args = {**body[XARGS], PARAMS: body[PARAMS]}

    assert [of_body(body).find(name) for name in (ID, "topic")] == ["a", "ships"]
    assert [of_extra_args(extra_args).find(name) for name in (ID, "topic")] == ["a", "ships"]


def test_headers_are_asked_for_by_name() -> None:
    """A connector sees none; a router's request has its own."""
    assert of_extra_args({}).header("x-kvkeep-cartridge") is None
    assert of_body({}, {"x-kvkeep-cartridge": "a"}.get).header("x-kvkeep-cartridge") == "a"
