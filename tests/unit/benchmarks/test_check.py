"""Figures of the check's own worth: what counts, against what, and what has no target."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.check import main, quick_figures, run_check, self_test_figures
from benchmarks.figures import Figure


def fault(name: str, planted: int, caught: int, wrong_answers: int = 0) -> dict[str, Any]:
    return {"fault": name, "planted": planted, "caught": caught, "wrong_answers": wrong_answers}


def stand(name: str, **more: Any) -> dict[str, Any]:
    return {
        "stand": name,
        "store": [fault("zeroed", 20, 20), fault("single bit", 20, 20)],
        "suites": [fault("zeroed", 20, 20), fault("swapped", 20, 19), fault("single bit", 20, 4)],
        "pairs": 500,
        "false_alarms": 0,
        "false_alarm_rate_max": 0.006,
        **more,
    }


def by_name(report: dict[str, Any]) -> dict[str, Figure]:
    return {figure.figure: figure for figure in self_test_figures(report)}


TIERS = [{"fault": "bit flip", "planted": 200, "caught": 200}]


def test_a_score_is_what_was_caught_of_what_was_planted() -> None:
    """One block-sized fault that got through misses the target; single bits count elsewhere."""
    found = by_name({"stands": [stand("stack")], "tiers": TIERS})

    suites, bits = found["check.suites.caught"], found["check.suites.single_bits_caught"]
    assert (suites.value, suites.peer, suites.met) == (39, 40, False)
    assert (bits.value, bits.peer, bits.met) == (4, 20, None)
    assert found["check.store.refused"].met is True
    assert found["check.lower_tiers.refused"].met is True


def test_an_answer_that_a_refused_fault_changed_is_a_miss() -> None:
    """Refusing is not enough: no answer may be wrong."""
    changed = stand("stack", store=[fault("zeroed", 20, 20, wrong_answers=1)])

    assert by_name({"stands": [changed], "tiers": TIERS})["check.store.wrong_answers"].met is False


def test_false_alarms_need_enough_real_pairs() -> None:
    """None over 500 real pairs meets both targets; 400 are too few; simulated ones are apart."""
    few = by_name({"stands": [stand("simulated"), stand("stack", pairs=400)], "tiers": TIERS})
    enough = by_name({"stands": [stand("stack")], "tiers": TIERS})

    assert (few["check.false_alarms"].met, few["check.pairs"].met) == (True, False)
    assert few["check.simulated.pairs"].met is None
    assert (enough["check.pairs"].met, enough["check.false_alarms_at_most"].value) == (True, 0.6)


def test_the_quick_group_is_timed_and_has_to_pass() -> None:
    """What does not apply is left out; a suite's time is told once however many runs it had."""
    runs = [
        {"suite": "determinism", "outcome": "passed", "passed": True, "took_s": 60.0},
        {"suite": "stress", "outcome": "failed", "passed": False, "took_s": 90.0},
        {"suite": "stress", "outcome": "passed", "passed": True, "took_s": 90.0},
        {"suite": "routing", "outcome": "not-applicable", "passed": False, "took_s": 0.0},
    ]

    found = {figure.figure: figure for figure in quick_figures({"runs": runs}, 26 * 60.0)}

    passed, took = found["check.quick.runs_passed"], found["check.quick.time"]
    assert (passed.value, passed.peer, passed.met) == (2, 3, False)
    assert (took.value, took.met) == (26.0, False)
    assert found["check.quick.stress.time"].value == 90.0
    assert "check.quick.routing.time" not in found


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for Python: writes the report it is told to, or says why not."""
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "if os.environ['OUTCOME'] != '2':\n"
        "    open(sys.argv[-1], 'w').write('{\"runs\": []}')\n"
        "print('it went wrong', file=sys.stderr)\n"
        "sys.exit(int(os.environ['OUTCOME']))\n"
    )
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


@pytest.mark.parametrize(("outcome", "has_report"), [("0", True), ("1", True), ("2", False)])
def test_a_check_that_failed_has_been_measured(
    program: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, has_report: bool
) -> None:
    """A failed check is a figure; one that could not run is said, with its own words."""
    monkeypatch.setenv("OUTCOME", outcome)

    report, took_s, said = run_check(["quick"])

    assert (report is not None) is has_report
    assert took_s > 0
    assert "it went wrong" in said


def test_what_could_not_run_is_no_success(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark ends with 1 and one sentence, and prints no figure."""
    monkeypatch.setenv("OUTCOME", "2")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    assert main(["--only", "self-test"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "self-test did not run: exit code 2: it went wrong" in captured.err
