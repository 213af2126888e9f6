"""``kvkeep check report``, ``diff`` and ``self-test`` as a person runs them."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.check import check
from kvkeep.validate.report.form import FORM


def run(*arguments: str) -> Result:
    return CliRunner().invoke(check, list(arguments))


def write(path: Path, verdict: str = "identical", ttft_s: float = 1.0) -> str:
    """A report of one run of twenty requests."""
    requests: list[dict[str, Any]] = [
        {
            "phase": "p", "prompt_id": f"q{number}", "index": number, "verdict": verdict,
            "candidate": {"ttft_s": ttft_s * (1 + number)},
        }
        for number in range(20)
    ]  # fmt: skip
    passed = verdict == "identical"
    outcome = "passed" if passed else "failed"
    one = {
        "schema": "x/1",
        "suite": "x",
        "outcome": outcome,
        "passed": passed,
        "requests": requests,
    }
    path.write_text(json.dumps({"schema": FORM, "passed": passed, "runs": [one]}))
    return str(path)


def test_a_report_is_shown_as_page_and_xml(tmp_path: Path) -> None:
    """Exit code 0 whatever the report says, and both files are there."""
    report = write(tmp_path / "r.json", "drift")
    html, junit = tmp_path / "r.html", tmp_path / "r.xml"

    result = run("report", report, "--html", str(html), "--junit", str(junit))

    assert result.exit_code == 0, result.output
    assert "did not pass" in html.read_text()
    assert ElementTree.parse(junit).getroot().get("failures") == "21"


def test_the_schema_is_printed() -> None:
    """As JSON, without a report."""
    result = run("report", "--schema")

    assert json.loads(result.stdout)["title"] == FORM


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["report"], "Name a report"),
        (["report", "r.json"], "Say what to write"),
        (["report", "none.json", "--html", "x.html"], "can't be read"),
        (["diff", "none.json", "none.json"], "can't be read"),
        (["self-test", "--simulated", "--stack", "s.yaml"], "without an engine"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], why: str) -> None:
    """Exit code 2 and a sentence on stderr."""
    result = run(*arguments)

    assert result.exit_code == 2
    assert why in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_equal_reports_are_not_worse(tmp_path: Path) -> None:
    """Exit code 0."""
    report = write(tmp_path / "a.json")

    result = run("diff", report, report)

    assert (result.exit_code, result.output.rstrip().splitlines()[-1]) == (0, "nothing is worse")


def test_a_worse_report_is_told_with_its_requests(tmp_path: Path) -> None:
    """Exit code 1, the requests by name, and everything as JSON where asked."""
    before, after = write(tmp_path / "a.json"), write(tmp_path / "b.json", "corruption")
    path = tmp_path / "diff.json"

    result = run("diff", before, after, "--json", str(path))

    assert result.exit_code == 1
    assert "request 1 (q0): identical -> corruption" in result.output
    found = json.loads(path.read_text())
    assert (found["worse"], found["runs"][0]["broken"]) == (True, 20)


def test_slower_fails_only_where_asked(tmp_path: Path) -> None:
    """Latency is told always, and judged where a limit was given."""
    before, after = write(tmp_path / "a.json"), write(tmp_path / "b.json", ttft_s=1.5)

    assert run("diff", before, after).exit_code == 0
    limited = run("diff", before, after, "--slower-max", "1.2")

    assert limited.exit_code == 1
    assert "1.50 times" in limited.output


def test_the_simulated_self_test_passes(tmp_path: Path) -> None:
    """Every fault is refused below verification and every block-sized one is caught behind it."""
    path = tmp_path / "self-test.json"

    result = run("self-test", "--simulated", "--json", str(path))

    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    (stand,) = found["stands"]
    assert (stand["stand"], stand["pairs"], stand["false_alarms"]) == ("simulated", 400, 0)
    assert all(each["caught"] == each["planted"] > 0 for each in stand["store"])
    behind = {each["fault"]: each["caught"] / each["planted"] for each in stand["suites"]}
    assert {rate for fault, rate in behind.items() if fault != "single bit"} == {1.0}
    assert all(tier["wrong_values"] == 0 for tier in found["tiers"])
