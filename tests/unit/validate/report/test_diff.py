"""Each request is compared with itself, and what held before has to hold."""

from typing import Any

import pytest

from kvkeep.validate.report.diff import compare_reports
from kvkeep.validate.report.form import FORM, Report, convert_report

SHARE = {"share": 1.0, "share_min": 0.8}


def request(number: int, verdict: str = "identical", ttft_s: float = 1.0) -> dict[str, Any]:
    answer = {"ttft_s": ttft_s, "total_s": ttft_s}
    return {"phase": "two", "prompt_id": f"p{number}", "index": number, "verdict": verdict,
            "candidate": answer}  # fmt: skip


def report(requests: list[dict[str, Any]], **more: Any) -> Report:
    run = {"schema": "x/1", "suite": "x", "outcome": "passed", "passed": True, "served": SHARE,
           "requests": requests, **more}  # fmt: skip
    return convert_report({"schema": FORM, "passed": True, "runs": [run]})


def test_equal_reports_differ_in_nothing() -> None:
    """Nothing is worse, and nothing has moved."""
    same = report([request(number) for number in range(5)])

    found = compare_reports(same, same)

    assert not found.is_worse
    assert (found.changes, found.moved) == ((), ())
    assert (found.runs[0].pairs, found.runs[0].p) == (5, 1.0)


def test_a_request_that_passed_and_does_not_is_worse() -> None:
    """One broken request is enough, however many were mended."""
    before = report([request(0), *(request(number, "drift") for number in range(1, 9))])
    after = report([request(0, "corruption"), *(request(number) for number in range(1, 9))])

    found = compare_reports(before, after)

    assert found.is_worse
    assert (found.runs[0].broken, found.runs[0].mended) == (1, 8)
    assert found.runs[0].p == pytest.approx(20 / 512)
    worse = [change for change in found.changes if change.is_worse]
    assert [(change.prompt_id, change.before, change.after) for change in worse] == [
        ("p0", "identical", "corruption")
    ]


def test_another_pass_is_a_change_and_not_worse() -> None:
    """Identical and near-tie both pass."""
    found = compare_reports(report([request(0)]), report([request(0, "near-tie")]))

    assert len(found.changes) == 1
    assert not found.is_worse


def test_latency_is_compared_request_by_request() -> None:
    """A tenth slower in each of twenty requests is sure, though one request outweighs the mean."""
    before = report([request(number, ttft_s=1.0 + number) for number in range(20)])
    times = [1.1 * (1.0 + number) for number in range(19)] + [0.001]
    after = report([request(number, ttft_s=time) for number, time in enumerate(times)])

    (latency,) = compare_reports(before, after).latencies

    assert latency.median_ratio == pytest.approx(1.1)
    assert (latency.faster, latency.slower, latency.is_sure) == (1, 19, True)
    assert compare_reports(before, after).slower_than(1.05) == [latency]
    assert compare_reports(before, after).slower_than(1.2) == []


def test_a_few_slow_requests_prove_nothing() -> None:
    """Three of four slower is what chance does."""
    before = report([request(number) for number in range(4)])
    after = report([request(number, ttft_s=9.0 if number else 0.5) for number in range(4)])

    assert compare_reports(before, after).slower_than(1.0) == []


def test_a_replay_that_is_served_less_is_worse() -> None:
    """It proved something before and does not any more."""
    found = compare_reports(report([]), report([], served={**SHARE, "share": 0.5}))

    assert found.is_worse
    assert (found.shares[0].before, found.shares[0].after) == (1.0, 0.5)


def test_a_check_that_fails_now_is_worse() -> None:
    """Also one that could not be checked any more."""
    before = report([], checks=[{"name": "a", "ok": True}, {"name": "b", "ok": False}])
    after = report([], checks=[{"name": "a", "ok": None}, {"name": "b", "ok": True}])

    found = compare_reports(before, after)

    assert [(moved.what, moved.is_worse) for moved in found.moved] == [
        ("check: a", True),
        ("check: b", False),
    ]


def test_what_is_missing_is_worse() -> None:
    """A run or a request that is not there any more can't have passed."""
    one, none = report([request(0)]), convert_report({"schema": FORM, "passed": True, "runs": []})

    assert compare_reports(one, none).is_worse
    assert compare_reports(one, report([])).is_worse
    assert not compare_reports(none, one).is_worse


def test_equal_prompts_are_told_apart_by_their_place() -> None:
    """A prompt that is asked twice in a phase is compared place by place."""
    before = [{**request(0), "index": 0}, {**request(0), "index": 1}]
    after = [{**request(0), "index": 0}, {**request(0, "drift"), "index": 1}]

    (change,) = compare_reports(report(before), report(after)).changes

    assert change.index == 1
