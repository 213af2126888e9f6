"""JUnit's XML: a CI sees every failure, and nothing unproven as green."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvkeep.validate.report.form import FORM, convert_report
from kvkeep.validate.report.junit import junit, write_junit

Written = Callable[..., Awaitable[dict[str, Any]]]


def suites(values: dict[str, Any]) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(junit(convert_report(values)).encode()))


async def test_a_pass_has_no_failure(written: Written) -> None:
    """A suite for each run, and in it a case for the outcome, each check and each request."""
    values = await written()

    found = suites(values)

    assert [suite.get("failures") for suite in found] == ["0", "0"]
    first = values["runs"][0]
    assert int(found[0].get("tests", "")) == 1 + len(first["checks"]) + len(first["requests"])


async def test_a_failure_is_a_failure_with_both_answers(written: Written) -> None:
    """The counts are those of the cases, and the text has what a person looks for first."""
    found = suites(await written(flip_every=2))[0]

    failures = list(found.iter("failure"))
    assert len(failures) == int(found.get("failures", "")) > 1
    texts = [failure.text or "" for failure in failures if failure.get("type") == "corruption"]
    assert any("reference: The code word" in text and "answer: " in text for text in texts)


async def test_failed_requests_are_errors(written: Written) -> None:
    """A request without an answer is an error, not a wrong answer."""
    found = suites(await written(empty_every=5))[0]

    assert int(found.get("errors", "")) == len(list(found.iter("error"))) > 0


def one_run(**more: Any) -> dict[str, Any]:
    run = {"schema": "x/1", "suite": "x", "outcome": "not-exercised", "passed": False, **more}
    return {"schema": FORM, "passed": False, "runs": [run]}


def test_a_run_without_requests_is_not_green() -> None:
    """A run that judged nothing fails by its outcome."""
    (suite,) = suites(one_run())

    assert suite.get("failures") == "1"


def test_a_suite_that_cannot_run_here_is_skipped() -> None:
    """Its outcome says why."""
    (suite,) = suites(one_run(outcome="not-applicable", reason="no router"))

    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")
    assert next(suite.iter("skipped")).get("message") == "no router"


def test_what_did_not_run_is_a_failure_and_what_cannot_is_skipped() -> None:
    """A gate that stayed shut is a failure; what can't be checked here is skipped."""
    checks = [
        {"name": "gate", "ok": False, "detail": "idle", "gate": True},
        {"name": "unknown", "ok": None, "detail": "no daemon"},
    ]

    (suite,) = suites(one_run(checks=checks))

    gate = next(case for case in suite if case.get("name") == "check: gate")
    assert [(failure.get("type"), failure.get("message")) for failure in gate] == [
        ("not-exercised", "idle")
    ]
    assert suite.get("skipped") == "1"


@pytest.mark.parametrize("text", ["\x00\x1b", "]]>", '"<&>', "\ud800", "a\nb"])
def test_any_text_leaves_the_file_readable(tmp_path: Path, text: str) -> None:
    """A parser reads the file whatever an answer held."""
    request = {"phase": text, "prompt_id": text, "verdict": "drift", "reason": text,
               "candidate": {"text": text}}  # fmt: skip
    path = tmp_path / "junit.xml"

    write_junit(convert_report(one_run(requests=[request])), path)

    assert ElementTree.parse(path).getroot().get("tests") == "2"
