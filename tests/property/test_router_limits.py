"""No sequence of arrivals and ends breaks what the limits promise."""

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.router.limits.admission import AdmissionQueue, Visit, VisitState
from kvkeep.router.limits.bucket import RetryBudget, TokenBucket

HOLDERS = ("a", "a", "a", "b", "b", "c")
"""One asks more than the others."""
PRESENT = (VisitState.ADMITTED, VisitState.WAITING)
WAIT_S = 5.0


class Witness:
    """Drives a queue, and remembers what every visit was told."""

    def __init__(self, running_max: int, waiting_max: int) -> None:
        self.queue = AdmissionQueue(running_max, waiting_max, WAIT_S)
        self.running_max, self.waiting_max = running_max, waiting_max
        self.visits: list[Visit] = []
        self.now_s = 0.0

    def count(self, state: VisitState) -> Counter[str]:
        return Counter(visit.holder for visit in self.visits if visit.state is state)

    def arrive(self, holder: str) -> None:
        waiting = self.count(VisitState.WAITING)
        visit = Visit(holder)
        pushed = self.queue.arrive(visit, self.now_s)
        self.visits.append(visit)
        if visit.state is VisitState.REFUSED:
            assert waiting.total() == self.waiting_max
            assert max(waiting.values(), default=0) <= waiting[holder] + 1
        for other in pushed:
            assert other.state is VisitState.REFUSED
            assert waiting[other.holder] > waiting[holder] + 1

    def leave(self, number: int) -> None:
        present = [v for v in self.visits if v.state in PRESENT]
        if not present:
            return
        visit = present[number % len(present)]
        was_running = visit.state is VisitState.ADMITTED
        before = self.count(VisitState.ADMITTED)
        before[visit.holder] -= was_running
        waiting = [v for v in self.visits if v.state is VisitState.WAITING and v is not visit]
        admitted = self.queue.leave(visit, self.now_s)
        assert len(admitted) == (1 if was_running and waiting else 0)
        for other in admitted:
            assert before[other.holder] == min(before[v.holder] for v in waiting)
            assert other is next(v for v in waiting if v.holder == other.holder)

    def wait(self, number: int) -> None:
        self.now_s += number / 100
        for visit in self.queue.expire(self.now_s):
            assert visit.state is VisitState.REFUSED

    def check(self) -> None:
        running, waiting = self.count(VisitState.ADMITTED), self.count(VisitState.WAITING)
        assert self.queue.num_running == running.total()
        assert self.queue.num_waiting == waiting.total() <= self.waiting_max
        assert running.total() <= self.running_max
        assert not waiting or running.total() == self.running_max
        for holder in HOLDERS:
            assert self.queue.num_present(holder) == running[holder] + waiting[holder]
        oldest = [v.since_s for v in self.visits if v.state is VisitState.WAITING]
        assert self.queue.next_deadline_s == (min(oldest) + WAIT_S if oldest else None)
        assert 1 <= self.queue.retry_after_s() <= 60


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 8), st.sampled_from([0.4, 0.6]))
def test_the_queue_keeps_its_promises(
    seed: int, running_max: int, waiting_max: int, share: float
) -> None:
    """Bounds hold, room is never idle while one waits, and it goes to who has least running."""
    chance, witness = Random(seed), Witness(running_max, waiting_max)
    for _ in range(150):
        draw = chance.random()
        if draw < share:
            witness.arrive(chance.choice(HOLDERS))
        elif draw < 0.95:
            witness.leave(chance.randrange(1000))
        else:
            witness.wait(chance.randrange(300))
        witness.check()
    for visit in [v for v in witness.visits if v.state in PRESENT]:
        # Who leaves may let in one that is about to leave itself.
        witness.queue.leave(visit, witness.now_s)

    assert (witness.queue.num_running, witness.queue.num_waiting) == (0, 0)
    assert witness.queue._holders == {}


@given(st.integers(2, 20), st.integers(1, 30))
def test_a_greedy_holder_takes_no_share_of_a_modest_one(places: int, crowd: int) -> None:
    """However many one holder sends, another one's request is queued, and is next to be let in."""
    queue = AdmissionQueue(places, 2, WAIT_S)
    first = [Visit("greedy") for _ in range(places + crowd + 2)]
    for visit in first:
        queue.arrive(visit, 0.0)
    modest = Visit("modest")
    queue.arrive(modest, 1.0)
    admitted = queue.leave(first[0], 2.0)

    assert list(admitted) == [modest]


@given(
    st.floats(0.01, 1000),
    st.integers(1, 5),
    st.lists(st.floats(0, 5), min_size=1, max_size=20),
    st.floats(0, 1e6),
)
def test_a_bucket_gives_its_rate_and_no_more(
    rate_per_s: float, burst: int, pauses_s: list[float], begin_s: float
) -> None:
    """In any time at most burst and rate x time are taken; who waits as told is served."""
    bucket = TokenBucket(rate_per_s, burst)
    now_s, taken = begin_s, list[float]()
    for pause_s in pauses_s:
        now_s += pause_s
        for _ in range(burst + 1):
            wait_s = bucket.wait_s(now_s)
            is_taken = bucket.take(now_s)
            assert is_taken == (wait_s == 0)
            taken += [now_s] * is_taken
    for number, first_s in enumerate(taken):
        for count, last_s in enumerate(taken[number:], 1):
            assert count <= burst + rate_per_s * (last_s - first_s) + 1e-3
    now_s += bucket.wait_s(now_s)

    assert bucket.take(now_s)


@given(
    st.floats(0.01, 1e5),
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 5000)), min_size=1, max_size=20),
)
def test_a_bucket_lends_once_and_has_it_back(
    rate_per_s: float, burst: int, asked: list[tuple[float, int]]
) -> None:
    """In any time at most burst, rate x time and one request beyond the burst are taken."""
    bucket = TokenBucket(rate_per_s, burst)
    now_s, taken = 1e5, list[tuple[float, int]]()
    for pause_s, amount in asked:
        now_s += pause_s
        wait_s = bucket.wait_s(now_s, amount)
        is_taken = bucket.take(now_s, amount)
        assert is_taken == (wait_s == 0)
        taken += [(now_s, amount)] * is_taken
    for number, (first_s, _) in enumerate(taken):
        total = 0
        for last_s, amount in taken[number:]:
            total += amount
            lent = max(0, amount - burst)
            assert total <= burst + lent + rate_per_s * (last_s - first_s + 1e-3) + 1e-3
    for amount in (1, burst, 5000):
        now_s += bucket.wait_s(now_s, amount)
        assert bucket.take(now_s, amount)


@given(
    st.floats(0, 1),
    st.floats(0, 10),
    st.integers(1, 5),
    st.integers(0, 2**32),
    st.integers(1, 30),
)
def test_retries_stay_within_their_budget(
    share: float, min_per_s: float, burst: int, seed: int, count: int
) -> None:
    """In any time, retries are a share of its requests, a few a second, and the burst."""
    chance, budget = Random(seed), RetryBudget(share, min_per_s, burst)
    now_s, num_requests, taken = 0.0, 0, list[tuple[float, int]]()
    for _ in range(count):
        now_s += chance.choice([0.0, 0.0, 0.01, 1.0, 30.0])
        for _ in range(chance.choice([0, 1, 100])):
            num_requests += 1
            budget.requested()
        for _ in range(chance.choice([0, 0, 1, 2 * burst])):
            taken += [(now_s, num_requests)] * budget.take(now_s)
    for number, (first_s, before) in enumerate(taken):
        for retries, (last_s, after) in enumerate(taken[number:], 1):
            allowed = burst + share * (after - before) + min_per_s * (last_s - first_s)
            assert retries <= allowed + 1e-3
