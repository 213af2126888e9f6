"""The few rules of a hand-off that are worth reading as examples."""

import math

import pytest

from kvkeep.router.handoff.machine import (
    Answer,
    CancelDecode,
    CancelPrefill,
    Failure,
    FailureKind,
    HandOff,
    HandOffState,
    PassOn,
    RelayFallback,
    ReleaseOffer,
    SendDecode,
    SendPrefill,
)
from kvkeep.router.handoff.settings import FallbackName, HandOffSettings

OFFER = b"{}"
LEASE_S = 30.0
BUSY = Failure(FailureKind.BUSY, 503, "busy")
GONE = Failure(FailureKind.UNREACHABLE, 502, "gone")
BROKEN = Failure(FailureKind.BROKEN, 502, "broken")
NOBODY = Failure(FailureKind.NO_ENDPOINT, 503, "nobody")


def machine(
    *, fallback: FallbackName = "none", is_reusable: bool = False, has_offer: bool = True
) -> HandOff:
    """One whose decode leg is sent, or else whose prefill leg is, at time 0."""
    found = HandOff(
        HandOffSettings(fallback=fallback),
        0.0,
        lease_s=math.inf if is_reusable else LEASE_S,
        is_reusable=is_reusable,
    )
    assert found.begin(0.0) == (SendPrefill(1),)
    if has_offer:
        assert found.prefill_answered(OFFER, 0.0) == (SendDecode(1, OFFER),)
    return found


def test_an_offer_that_was_refused_goes_to_nobody_else() -> None:
    """A busy decode engine has had the blocks freed: the prompt is computed again."""
    handed = machine()
    handed.decode_began()

    assert handed.decode_failed(BUSY, 1.0) == (SendPrefill(2),)


def test_a_reusable_offer_goes_to_the_next_engine() -> None:
    """Blocks in the pool are there for whoever is not busy."""
    handed = machine(is_reusable=True)
    handed.decode_began()

    assert handed.decode_failed(BUSY, 1.0) == (SendDecode(2, OFFER),)


def test_an_offer_nobody_was_told_of_goes_to_the_next_engine() -> None:
    """Where no connection was made, the blocks are still the offer's."""
    assert machine().decode_failed(GONE, 1.0) == (SendDecode(2, OFFER),)


def test_an_offer_whose_lease_runs_low_is_released_and_made_anew() -> None:
    """With less than the margin left no decode engine is sent to fetch it."""
    handed = machine()

    assert handed.decode_failed(GONE, LEASE_S - 1.0) == (ReleaseOffer(OFFER), SendPrefill(2))


def test_what_no_engine_takes_is_released() -> None:
    """When none is left to try, the error is that of the last engine that said something."""
    handed = machine()
    handed.decode_failed(GONE, 1.0)

    assert handed.decode_failed(NOBODY, 1.0) == (ReleaseOffer(OFFER), Answer(502, "gone"))
    assert handed.state is HandOffState.FAILED


def test_an_offer_that_was_given_is_not_released() -> None:
    """A decode engine that broke down may be reading it."""
    handed = machine()
    handed.decode_began()

    assert handed.decode_failed(BROKEN, 1.0) == (Answer(502, "broken"),)


def test_a_fallback_is_tried_once() -> None:
    """The label says which leg failed, and how; what fails then is an error."""
    handed = machine(fallback="decode_alone")
    handed.decode_began()

    assert handed.decode_failed(BROKEN, 1.0) == (
        RelayFallback("decode_broken"),
        SendDecode(2, None),
    )
    handed.decode_began()
    assert handed.decode_failed(BROKEN, 2.0) == (Answer(502, "broken"),)


def test_a_fallback_goes_around_engines_that_never_had_the_request() -> None:
    """Alone as with an offer, the next decode engine is asked."""
    handed = machine(fallback="decode_alone", has_offer=False)
    handed.prefill_failed(BROKEN, 1.0)

    assert handed.prefill_failed(NOBODY, 1.0) == (
        RelayFallback("prefill_broken"),
        SendDecode(1, None),
    )
    assert handed.decode_failed(GONE, 1.0) == (SendDecode(2, None),)


def test_a_refusal_is_passed_on() -> None:
    """What is wrong for one engine is wrong for all: nothing falls back."""
    handed = machine(fallback="decode_alone", has_offer=False)

    assert handed.prefill_refused(1.0) == (PassOn(),)
    assert handed.is_refused


def test_a_prompt_without_blocks_is_decoded_alone() -> None:
    """Nothing failed, so this is no fallback."""
    handed = machine(has_offer=False)

    assert handed.prefill_empty(1.0) == (SendDecode(1, None),)
    assert (handed.is_empty, handed.fallback) == (True, "")


@pytest.mark.parametrize("leave", ["client_left", "stop"])
def test_an_end_from_outside_cancels_what_runs(leave: str) -> None:
    """And releases what no decode engine was told of."""

    def end(handed: HandOff) -> tuple[object, ...]:
        if leave == "client_left":
            return handed.client_left(1.0)
        *actions, said = handed.stop("the router stops", 1.0)
        assert said == Answer(503, "the router stops")
        return tuple(actions)

    told = machine()
    told.decode_began()

    assert end(machine(has_offer=False)) == (CancelPrefill(False),)
    assert end(machine()) == (CancelDecode(False), ReleaseOffer(OFFER))
    assert end(told) == (CancelDecode(False),)
    assert end(told) == () if leave == "client_left" else told.stop("again", 2.0) == ()


def test_a_late_offer_is_released() -> None:
    """Who left can't fetch it."""
    handed = machine(has_offer=False)
    handed.client_left(1.0)

    assert handed.prefill_answered(OFFER, 2.0) == (ReleaseOffer(OFFER),)
