"""No order of events leaves a hand-off hanging, an offer with nobody, or something done twice."""

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.router.handoff.machine import (
    ENDS,
    Actions,
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

LEASE_S = 30.0
INPUTS = (
    "prefill_answered",
    "prefill_refused",
    "prefill_failed",
    "decode_began",
    "decode_failed",
    "decode_answered",
    "decode_ended",
    "client_left",
    "stop",
    "tick",
)
LEG_ENDS = {
    ("prefill_answered", HandOffState.PREFILL_SENT),
    ("prefill_refused", HandOffState.PREFILL_SENT),
    ("prefill_failed", HandOffState.PREFILL_SENT),
    ("decode_failed", HandOffState.DECODE_SENT),
    ("decode_ended", HandOffState.ANSWERING),
}
IN_TURN = {
    HandOffState.PREFILL_SENT: ("prefill_answered", "prefill_failed", "tick"),
    HandOffState.DECODE_SENT: ("decode_began", "decode_failed", "decode_answered"),
    HandOffState.ANSWERING: ("decode_ended", "tick"),
}
SETTINGS = st.builds(
    HandOffSettings,
    fallback=st.sampled_from(["none", "decode_alone"]),
    prefill_attempts=st.integers(1, 4),
    decode_attempts=st.integers(1, 4),
    prefill_timeout_s=st.sampled_from([1.0, 20.0, 100.0]),
    decode_timeout_s=st.sampled_from([1.0, 20.0, 100.0]),
)


class Witness:
    """Drives a machine as the relay does, and keeps account of what it wants."""

    def __init__(self, settings: HandOffSettings, is_reusable: bool) -> None:
        self.settings = settings
        self.now_s = 0.0
        self.machine = HandOff(
            settings, 0.0, lease_s=math.inf if is_reusable else LEASE_S, is_reusable=is_reusable
        )
        self.is_reusable = is_reusable
        self.running = ""
        """Which leg runs."""
        self.sent_offer: bytes | None = None
        self.expires_s: dict[bytes, float] = {}
        self.given: set[bytes] = set()
        """Offers that a decode engine was told of."""
        self.is_begun = False
        """Whether the decode engine of the leg that runs has the request."""
        self.released: Counter[bytes] = Counter()
        self.said: list[str] = []
        self.num = Counter[str]()
        self.take(self.machine.begin(0.0))

    def offered(self) -> bytes:
        offer = b"offer-%d" % len(self.expires_s)
        self.expires_s[offer] = self.now_s + LEASE_S
        return offer

    def put_in(self, name: str, kind: FailureKind = FailureKind.BROKEN) -> None:
        """One event, in turn or not."""
        machine, was_over = self.machine, self.machine.is_over
        if (name, machine.state) in LEG_ENDS:
            self.running = ""
        failure = Failure(kind, 502, "no")
        actions: Actions = ()
        if name == "prefill_answered":
            actions = machine.prefill_answered(self.offered(), self.now_s)
        elif name == "prefill_refused":
            actions = machine.prefill_refused(self.now_s)
        elif name == "prefill_failed":
            actions = machine.prefill_failed(failure, self.now_s)
        elif name == "decode_began":
            if machine.state is HandOffState.DECODE_SENT:
                self.is_begun = True
                if self.sent_offer is not None:
                    self.given.add(self.sent_offer)
            machine.decode_began()
        elif name == "decode_failed":
            actions = machine.decode_failed(failure, self.now_s)
        elif name == "decode_answered":
            if machine.state is HandOffState.DECODE_SENT:
                self.put_in("decode_began")
            machine.decode_answered(self.now_s)
        elif name == "decode_ended":
            machine.decode_ended(is_well=kind is FailureKind.BUSY, now_s=self.now_s)
        elif name == "client_left":
            actions = machine.client_left(self.now_s)
        elif name == "stop":
            actions = machine.stop("the router stops", self.now_s)
        else:
            actions = machine.tick(self.now_s)
        if was_over:
            assert all(isinstance(each, ReleaseOffer) for each in actions)
        self.take(actions)

    def take(self, actions: Actions) -> None:
        for idx, action in enumerate(actions):
            self.num[type(action).__name__] += 1
            if isinstance(action, SendPrefill | SendDecode | Answer | PassOn):
                assert idx == len(actions) - 1
                assert not self.running, f"{self.running} runs still"
            match action:
                case SendPrefill(attempt):
                    assert attempt == self.num["SendPrefill"]
                    self.running = "prefill"
                case SendDecode(attempt, offer):
                    assert attempt == self.num["SendDecode"]
                    self.running, self.sent_offer, self.is_begun = "decode", offer, False
                    if offer is not None:
                        self.check_may_be_sent(offer)
                    else:
                        assert self.machine.fallback
                case CancelPrefill():
                    assert self.running == "prefill"
                    self.running = ""
                case CancelDecode():
                    assert self.running == "decode"
                    self.running = ""
                case ReleaseOffer(offer):
                    self.released[offer] += 1
                    assert offer not in self.given
                case RelayFallback():
                    assert self.settings.fallback == "decode_alone"
                    assert not {"Answer", "PassOn"} & set(self.num)
                case Answer() | PassOn():
                    self.said.append(type(action).__name__)

    def check_may_be_sent(self, offer: bytes) -> None:
        assert not self.released[offer]
        if not self.is_reusable:
            assert offer not in self.given, "two engines would fetch one offer"
            left_s = self.expires_s[offer] - self.now_s
            assert left_s >= self.settings.offer_margin_s

    def check_end(self) -> None:
        assert self.machine.state in ENDS
        assert not self.running
        assert self.num["SendPrefill"] <= self.settings.prefill_attempts
        assert self.num["SendDecode"] <= self.settings.decode_attempts
        assert self.num["RelayFallback"] <= 1
        assert len(self.said) <= 1
        was_answered = self.machine.state is HandOffState.DONE
        assert not (was_answered and self.said)
        assert set(self.expires_s) == self.given | set(self.released), "an offer is nobody's"
        assert max(self.released.values(), default=0) <= 1


@given(
    SETTINGS,
    st.booleans(),
    st.lists(
        st.tuples(
            st.integers(0, len(INPUTS) - 1),
            st.booleans(),
            st.sampled_from([*FailureKind, FailureKind.BUSY, FailureKind.UNREACHABLE]),
            st.sampled_from([0.0, 0.5, 27.0]),
        ),
        max_size=25,
    ),
)
def test_every_order_of_events_ends_well(
    settings: HandOffSettings, is_reusable: bool, events: list[tuple[int, bool, FailureKind, float]]
) -> None:
    """Whatever comes, in turn or not: nothing is sent twice at once, no offer is left to nobody."""
    witness = Witness(settings, is_reusable)
    for idx, is_in_turn, kind, passed_s in events:
        names = IN_TURN.get(witness.machine.state, INPUTS) if is_in_turn else INPUTS
        witness.now_s += passed_s
        witness.put_in(names[idx % len(names)], kind)
    if not witness.machine.is_over:
        witness.put_in("client_left")

    witness.check_end()


@given(SETTINGS, st.booleans(), st.randoms(use_true_random=False))
def test_time_alone_ends_it(settings: HandOffSettings, is_reusable: bool, chance: Random) -> None:
    """With engines that say nothing, or offer and say nothing then, it ends by its deadlines."""
    witness = Witness(settings, is_reusable)
    while not witness.machine.is_over:
        deadline_s = witness.machine.deadline_s
        assert deadline_s < math.inf
        witness.now_s = deadline_s
        if chance.random() < 0.3:
            witness.put_in("decode_began")
        if witness.machine.state is HandOffState.PREFILL_SENT and chance.random() < 0.5:
            witness.put_in("prefill_answered")
        else:
            witness.put_in("tick")

    witness.check_end()
    assert witness.now_s <= settings.prefill_attempts * settings.prefill_timeout_s + (
        settings.decode_attempts * settings.decode_timeout_s
    )


@pytest.mark.parametrize("fallback", ["none", "decode_alone"])
@pytest.mark.parametrize("kind", FailureKind)
def test_no_fallback_after_the_first_byte(kind: FailureKind, fallback: FallbackName) -> None:
    """Once the client has the beginning of a response, nothing else is ever sent for it."""
    witness = Witness(HandOffSettings(fallback=fallback), False)
    for name in ("prefill_answered", "decode_began", "decode_answered"):
        witness.put_in(name)
    before = witness.num.copy()
    witness.put_in("decode_failed", kind)
    witness.put_in("decode_ended", kind)

    assert witness.machine.is_over
    assert witness.num == before
