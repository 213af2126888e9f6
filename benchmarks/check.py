"""What ``kvkeep check`` is worth: planted faults found, false alarms, and how long it takes.

On a real engine, the packaged model and a stack of its own, as a user runs it:

    python -m benchmarks.check [--pairs 500] [--num-prompts 20] [--only self-test|quick]

``store.*`` are faults planted below verification: each has to be refused. ``suites.*`` are planted
behind it, where only answers can show them: in the exact mode every block-sized one must be caught;
a single bit may vanish in rounding, so for it there is a rate and no target. False alarms are
counted over pairs of prompts that were neither struck nor used for the noise floor. The simulated
stand is told apart. At last ``kvkeep check quick`` runs at its small scale.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Target, emit

OK, BROKEN = 0, 1
PARTS = ("self-test", "quick")
PAIRS_MIN = 500
QUICK_MINUTES_MAX = 25
ALL = Target("ratio", ">=", 1)
STANDS = {"simulated": "check.simulated", "stack": "check"}
"""Where the figures of a stand stand."""
SINGLE_BIT = "single bit"
ENDED = {0, 1}
"""Exit codes of a check that ran to its end, passed or not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whether or not targets are met."""
    parser = argparse.ArgumentParser(prog="benchmarks.check", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", default=PAIRS_MIN, type=int, help="prompts without a fault")
    parser.add_argument("--num-prompts", default=20, type=int, help="prompts struck by each fault")
    parser.add_argument("--only", choices=PARTS, help="one of the two parts")
    asked = parser.parse_args(argv)
    # Told to stop, this stops what it runs, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(BROKEN))
    counts = ["--pairs", str(asked.pairs), "--num-prompts", str(asked.num_prompts)]
    commands = {"self-test": ["self-test", *counts], "quick": ["quick", "--scale", "small"]}
    status = OK
    for part in PARTS if asked.only is None else (asked.only,):
        report, took_s, said = run_check(commands[part])
        if report is None:
            print(f"check: {part} did not run: {said}", file=sys.stderr, flush=True)
            status = BROKEN
            continue
        found = self_test_figures(report) if part == "self-test" else quick_figures(report, took_s)
        for figure in found:
            emit(figure)
    return status


def run_check(arguments: Sequence[str]) -> tuple[dict[str, Any] | None, float, str]:
    """Run ``kvkeep check`` as a user does.

    Returns:
        Its report, None if it wrote none; how long it took, in seconds; the last that it said.
    """
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-check-") as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "kvkeep", "check", *arguments, "--json", str(path)]
        began_s = time.perf_counter()
        code, words, complaints = _run(command)
        took_s = time.perf_counter() - began_s
        print(words, file=sys.stderr, flush=True)
        said = (complaints.strip().splitlines() or ["it said nothing"])[-1]
        if code not in ENDED or not path.exists():
            return None, took_s, f"exit code {code}: {said}"
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return report, took_s, said


def _run(command: Sequence[str]) -> tuple[int, str, str]:
    """Run a program to its end; broken off, it is asked to stop, so that it stops what it began."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            words, complaints = child.communicate()
        except BaseException:
            child.terminate()
            raise
    return child.returncode, words, complaints


def self_test_figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Two scores, single bits, and false alarms of each stand; wrong reads of lower tiers."""
    for stand in report["stands"]:
        yield from _stand_figures(STANDS[stand["stand"]], stand)
    yield _score("check.lower_tiers.refused", report["tiers"])


def _stand_figures(name: str, stand: Mapping[str, Any]) -> Iterator[Figure]:
    large = [each for each in stand["suites"] if each["fault"] != SINGLE_BIT]
    bits = [each for each in stand["suites"] if each["fault"] == SINGLE_BIT]
    yield _score(f"{name}.store.refused", stand["store"])
    yield Figure(
        f"{name}.store.wrong_answers",
        sum(each["wrong_answers"] for each in stand["store"]),
        "answers",
        target=Target("value", "<=", 0),
        samples=sum(each["planted"] for each in stand["store"]),
    )
    yield _score(f"{name}.suites.caught", large)
    yield _score(f"{name}.suites.single_bits_caught", bits, target=None)
    yield Figure(
        f"{name}.false_alarms",
        stand["false_alarms"],
        "pairs",
        target=Target("value", "<=", 0),
        samples=stand["pairs"],
    )
    yield Figure(f"{name}.false_alarms_at_most", 100 * stand["false_alarm_rate_max"], "%")
    is_real = stand["stand"] != "simulated"
    target = Target("value", ">=", PAIRS_MIN) if is_real else None
    yield Figure(f"{name}.pairs", stand["pairs"], "pairs", target=target)


def _score(
    name: str, scores: Sequence[Mapping[str, Any]], *, target: Target | None = ALL
) -> Figure:
    planted = sum(each["planted"] for each in scores)
    caught = sum(each["caught"] for each in scores)
    return Figure(
        name,
        caught,
        "faults",
        peer=planted,
        peer_name="planted",
        target=target,
        samples=planted,
    )


def quick_figures(report: Mapping[str, Any], took_s: float) -> Iterator[Figure]:
    """How long the quick group takes with the start of its stack, and what became of it."""
    counted = [run for run in report["runs"] if run["outcome"] != "not-applicable"]
    passed = sum(bool(run["passed"]) for run in counted)
    yield Figure(
        "check.quick.runs_passed",
        passed,
        "runs",
        peer=len(counted),
        peer_name="runs that apply",
        target=ALL,
        samples=len(counted),
    )
    yield Figure(
        "check.quick.time",
        took_s / 60,
        "min",
        target=Target("value", "<=", QUICK_MINUTES_MAX),
        samples=1,
    )
    for suite in dict.fromkeys(str(run["suite"]) for run in counted):
        # A suite's runs are timed together, and each says so.
        spent_s = max(run.get("took_s") or 0.0 for run in counted if run["suite"] == suite)
        yield Figure(f"check.quick.{suite}.time", spent_s, "s", samples=1)


if __name__ == "__main__":
    sys.exit(main())
