"""Wrappers over any values, cuts and damage; the breaker over any calls."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeep.core.breaker import Breaker, BreakerState
from kvkeep.model.errors import UnavailableError
from kvkeep.testing.tier_contract import block_key, in_parts
from kvkeep.tiers.base import Tier
from kvkeep.tiers.faulty import FaultyTier, TierFault
from kvkeep.tiers.memory import MemoryTier
from kvkeep.tiers.wrappers.codecs import ZstdCodec
from kvkeep.tiers.wrappers.compressed import CompressedTier
from kvkeep.tiers.wrappers.encrypted import EncryptedTier
from kvkeep.tiers.wrappers.key_ring import KeyRing
from kvkeep.tiers.wrappers.metered import MeteredTier
from kvkeep.tiers.wrappers.verified import VerifiedTier

RING = KeyRing([b"k" * 32])
KEY = block_key(1)
ROOM = 4096
VALUES = st.binary(max_size=300) | st.builds(
    lambda piece, count: piece * count, st.binary(min_size=1, max_size=9), st.integers(1, 400)
)


def wrappings(inner: Tier) -> list[Tier]:
    """Each checking wrapper, and all of them."""
    return [
        VerifiedTier(inner),
        EncryptedTier(inner, RING),
        CompressedTier(inner, ZstdCodec()),
        MeteredTier(VerifiedTier(CompressedTier(EncryptedTier(inner, RING), ZstdCodec(3)))),
    ]


def cut(memory: bytes | bytearray, cuts: Sequence[int]) -> list[memoryview]:
    """Parts of these bytes, some of them empty."""
    return list(in_parts(memory, *sorted(at % (len(memory) + 1) for at in cuts)))


def read_one(tier: Tier, cuts: Sequence[int] = ()) -> bytes | None:
    room = bytearray(ROOM)
    (length,) = tier.read([KEY], [cut(room, cuts)])
    return None if length is None else bytes(room[:length])


CUTS = st.lists(st.integers(0, ROOM), max_size=4)


@given(VALUES, CUTS, CUTS)
def test_any_value_comes_back_in_any_pieces(
    value: bytes, written: list[int], wanted: list[int]
) -> None:
    """Bit for bit, however it was cut when it was written and read."""
    for which in range(4):
        tier = wrappings(MemoryTier(1 << 16))[which]

        assert tier.write([KEY], [cut(value, written)]) == [True]
        assert read_one(tier, wanted) == value


@given(st.binary(max_size=400))
def test_rubbish_is_never_a_value(rubbish: bytes) -> None:
    """Whatever lies in the inner tier: a miss, no error, and it is gone."""
    for which in (0, 1, 3):
        inner = MemoryTier(1 << 16)
        inner.write([KEY], [in_parts(rubbish)])

        assert read_one(wrappings(inner)[which]) is None
        assert inner.lookup([KEY]) == [False]


@given(VALUES, st.data())
def test_any_damage_is_a_miss(value: bytes, data: st.DataObject) -> None:
    """Bytes changed, cut off, put in or added at any place; for the wrappers that prove."""
    for which in (0, 1, 3):
        inner = MemoryTier(1 << 16)
        tier = wrappings(inner)[which]
        tier.write([KEY], [in_parts(value)])
        stored = bytearray(ROOM)
        (length,) = inner.read([KEY], [in_parts(stored)])
        good = bytes(stored[:length])
        start = data.draw(st.integers(0, len(good)))
        end = data.draw(st.integers(start, min(len(good), start + 20)))
        bad = good[:start] + data.draw(st.binary(max_size=20)) + good[end:]
        if bad == good:
            continue
        inner.write([KEY], [in_parts(bad)])

        assert read_one(tier) is None


@given(st.binary(max_size=200), st.integers(0, 1 << 62))
def test_no_frame_is_an_error(frame: bytes, claimed: int) -> None:
    """The compressing wrapper answers any stored bytes within the room."""
    header = b"kvkc" + b"\x01\x00\x01\x02" + claimed.to_bytes(8, "little")
    for prefix in (header, header[:4], b"", header + b"\x28\xb5\x2f\xfd"):
        inner = MemoryTier(1 << 16)
        inner.write([KEY], [in_parts(prefix + frame)])
        found = read_one(CompressedTier(inner, ZstdCodec()))

        assert found is None or len(found) <= ROOM


@given(
    st.dictionaries(
        st.sampled_from([fault for fault in TierFault if fault is not TierFault.HANG]),
        st.floats(0.0, 1.0),
    ),
    st.integers(0, 1 << 32),
    st.lists(st.integers(0, 5), min_size=1, max_size=8, unique=True),
)
@settings(max_examples=60)
def test_a_hit_through_any_faults_is_right(
    chances: dict[TierFault, float], seed: int, numbers: list[int]
) -> None:
    """Any mixture of faults, any batch: what is answered is what was written."""
    faulty = FaultyTier(MemoryTier(1 << 16), chances, seed)
    faulty.sleep = lambda _seconds: None
    tier = VerifiedTier(faulty)
    keys = [block_key(number, namespace=number % 3) for number in numbers]
    values = [bytes([number]) * (50 + number) for number in numbers]
    for _ in range(4):
        rooms = [bytearray(100) for _ in keys]
        try:
            tier.write(keys, [in_parts(value, 3) for value in values])
            lengths = tier.read(keys, [in_parts(room) for room in rooms])
        except UnavailableError:
            continue
        for room, length, value in zip(rooms, lengths, values, strict=True):
            assert length is None or room[:length] == value


class BreakerMachine(RuleBasedStateMachine):
    """Calls begin and report in any order; time goes on by any steps."""

    @initialize(failures_max=st.integers(1, 4))
    def make(self, failures_max: int) -> None:
        self.failures_max = failures_max
        self.breaker = Breaker(failures_max, pause_s=2.0)
        self.now_s = 0.0
        self.tickets: list[int] = []
        self.failures = 0
        """In a row, of current calls, in the closed state."""
        self.opened_s = 0.0

    @rule()
    def begin(self) -> None:
        state, is_admitting = self.breaker.state, self.breaker.is_admitting(self.now_s)
        ticket = self.breaker.begin(self.now_s)

        assert (ticket is not None) == is_admitting
        if ticket is not None:
            assert self.breaker.is_current(ticket)
            assert state is BreakerState.CLOSED or self.now_s >= self.opened_s + 2.0
            self.tickets.append(ticket)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), how=st.sampled_from(["finish", "fail", "give_up"]))
    def report(self, data: st.DataObject, how: str) -> None:
        ticket = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        before, is_current = self.breaker.state, self.breaker.is_current(ticket)
        if how == "finish":
            self.breaker.finish(ticket)
        else:
            getattr(self.breaker, how)(ticket, self.now_s)
        self._expect(before, how, is_current=is_current)

    def _expect(self, before: BreakerState, how: str, *, is_current: bool) -> None:
        if not is_current:
            assert self.breaker.state is before
            return
        assert before is not BreakerState.OPEN
        self.failures = 0 if how == "finish" else self.failures + 1
        is_trip = how == "give_up" or self.failures >= self.failures_max
        if how == "finish":
            assert self.breaker.state is BreakerState.CLOSED
        elif is_trip or before is BreakerState.HALF_OPEN:
            assert self.breaker.state is BreakerState.OPEN
            self.opened_s, self.failures = self.now_s, 0
        else:
            assert self.breaker.state is BreakerState.CLOSED

    @rule(step_s=st.sampled_from([0.1, 1.0, 2.0, 60.0]))
    def wait(self, step_s: float) -> None:
        self.now_s += step_s

    @invariant()
    def one_trial_at_most(self) -> None:
        if self.breaker.state is BreakerState.HALF_OPEN:
            assert not self.breaker.is_admitting(self.now_s + 1e9)
            assert sum(self.breaker.is_current(ticket) for ticket in self.tickets) == 1
        if self.breaker.state is BreakerState.OPEN:
            assert self.breaker.is_admitting(self.opened_s + 2.0)
            assert not any(self.breaker.is_current(ticket) for ticket in self.tickets)


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=60, stateful_step_count=40)
