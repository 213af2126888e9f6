"""Rates by example; tests/property/test_router_limits.py has the promises."""

from kvkeep.router.limits.bucket import RetryBudget, TokenBucket


def test_a_bucket_fills_at_its_rate() -> None:
    """Two at once, then one each half second."""
    bucket = TokenBucket(2.0, 2)
    at_once = [bucket.take(10.0) for _ in range(3)]

    assert at_once == [True, True, False]
    assert bucket.wait_s(10.0) == 0.5
    assert [bucket.take(10.4), bucket.take(10.5)] == [False, True]


def test_a_clock_that_stands_still_fills_nothing() -> None:
    """Time that goes back counts as none."""
    bucket = TokenBucket(1.0, 1)
    bucket.take(10.0)

    assert not bucket.take(5.0)


def test_a_budget_grows_with_requests() -> None:
    """One retry for ten requests, however many retries are asked for in between."""
    budget = RetryBudget(0.1, 0.0, burst=1)
    assert budget.take(0.0)
    tries = []
    for _ in range(20):
        budget.requested()
        tries.append(budget.take(0.0))

    assert sum(tries) == 2


def test_a_quiet_router_retries_too() -> None:
    """With few requests there is a retry each second."""
    budget = RetryBudget(0.1, 1.0, burst=1)

    assert [budget.take(now_s) for now_s in (0.0, 0.5, 1.0)] == [True, False, True]


def test_what_is_more_than_the_limit_is_owed() -> None:
    """It passes when the bucket is full, and has to come back before anything else does."""
    bucket = TokenBucket(2.0, 10)
    bucket.take(0.0, 1)
    assert not bucket.take(0.0, 30)
    assert bucket.wait_s(0.0, 30) == 0.5
    assert bucket.take(0.5, 30)

    assert bucket.wait_s(0.5, 1) == 10.5
    assert [bucket.take(10.9, 1), bucket.take(11.0, 1)] == [False, True]


def test_what_was_not_used_is_put_back() -> None:
    """And what was used beyond it is owed; more than full is not possible."""
    bucket = TokenBucket(1.0, 10)
    bucket.take(0.0, 8)
    bucket.put_back(5, 0.0)
    assert bucket.wait_s(0.0, 7) == 0
    bucket.put_back(-9, 0.0)
    assert bucket.wait_s(0.0, 1) == 3
    bucket.put_back(100, 0.0)

    assert bucket.wait_s(0.0, 10) == 0
    assert bucket.take(0.0, 10)
    assert bucket.wait_s(0.0, 1) == 1
