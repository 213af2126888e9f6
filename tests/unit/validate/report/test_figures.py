"""What the plots show is what the report says."""

from typing import Any

from kvkeep.validate.report import figures
from kvkeep.validate.report.form import Answer, Counters, Phase, Request, Run


def run_of(**more: Any) -> Run:
    return Run(schema="x/1", suite="x", outcome="passed", passed=True, **more)


def request(phase: str, number: int, ttft_s: float, **more: Any) -> Request:
    answer = Answer(ttft_s=ttft_s, total_s=2 * ttft_s, prompt_tokens=100 * number)
    values = {"verdict": "identical", **more}
    return Request(
        phase=phase, prompt_id=f"p{number}", index=number, candidate=answer, **values
    )  # fmt: skip


def test_each_phase_has_its_times() -> None:
    """First token and last byte, request by request."""
    run = run_of(requests=[request("one", 1, 0.1), request("two", 1, 0.2)])

    assert figures.ttft_s(run) == {"one": [0.1], "two": [0.2]}
    assert figures.total_s(run) == {"one": [0.2], "two": [0.4]}
    assert figures.ttft_by_length(run) == {"one": [(100.0, 0.1)], "two": [(100.0, 0.2)]}


def test_a_reference_that_no_phase_has_is_shown_once() -> None:
    """Two answers judged against the same computed one do not show it twice."""
    computed = Answer(ttft_s=0.9, total_s=1.0, prompt_tokens=5)
    requests = [
        request("one", 1, 0.1, reference=computed),
        request("two", 1, 0.2, reference=computed),
    ]

    assert figures.ttft_s(run_of(requests=requests))[figures.REFERENCE] == [0.9]


def test_a_reference_that_was_judged_itself_is_not_shown_again() -> None:
    """Phase 2 is judged against phase 1, whose answers stand under their own name."""
    first = request("one", 1, 0.1)
    second = request("two", 1, 0.2, reference=first.candidate)

    assert figures.REFERENCE not in figures.ttft_s(run_of(requests=[first, second]))


def phase(engine: dict[str, float], daemon: dict[str, int]) -> Phase:
    return Phase(name="p", counters=Counters(engine=engine, daemon=daemon))


ENGINE = {
    "vllm:prefix_cache_queries": 1000.0,
    "vllm:prefix_cache_hits": 100.0,
    "vllm:external_prefix_cache_hits": 600.0,
}


def test_tokens_are_told_apart_by_place() -> None:
    """What was promoted came from a lower tier, the rest of the outside from the pool."""
    run = run_of(
        phases=[phase(ENGINE, {"blocks_promoted": 10})],
        subject={"capabilities": {"block_tokens": 16}},
    )

    assert figures.served_tokens(run)["p"] == {
        figures.COMPUTED: 300.0,
        figures.ENGINE: 100.0,
        figures.POOL: 440.0,
        figures.LOWER: 160.0,
    }


def test_without_a_daemon_the_outside_is_one_place() -> None:
    """Whatever it is: nobody said."""
    run = run_of(phases=[phase(ENGINE, {})])

    assert figures.served_tokens(run)["p"][figures.OUTSIDE] == 600.0


def test_without_counters_nothing_is_claimed() -> None:
    """An engine that counts nothing is left out."""
    assert figures.served_tokens(run_of(phases=[phase({}, {})])) == {}


def test_failures_come_first() -> None:
    """Whoever reads only the beginning sees them."""
    run = run_of(requests=[request("one", 1, 0.1), request("one", 2, 0.1, verdict="drift")])

    assert [each.verdict for each in figures.failed_first(run)] == ["drift", "identical"]


def test_verdicts_are_in_the_order_of_asking() -> None:
    """By their place in the phase, not in the file."""
    run = run_of(requests=[request("one", 2, 0.1, verdict="drift"), request("one", 1, 0.1)])

    lane = figures.verdicts_in_order(run)["one"]
    assert [verdict for verdict, _ in lane] == ["identical", "drift"]
    assert "request 3 (p2)" in lane[1][1]
