"""What is written is what is documented, and what is read is checked."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.model.errors import InputError
from kvkeep.validate.report import form
from kvkeep.validate.report.form import convert_report, field_tables, json_schema, read_report
from kvkeep.validate.suite.base import NotApplicable, NotStarted

Written = Callable[..., Awaitable[dict[str, Any]]]

SMALL: dict[str, Any] = {
    "schema": form.FORM,
    "passed": True,
    "runs": [{"schema": "x/1", "suite": "x", "outcome": "passed", "passed": True}],
}


def strangers(value: Any, known: Any, path: str = "") -> list[str]:
    """Fields that are written and not documented."""
    if isinstance(value, dict) and isinstance(known, dict):
        here = [f"{path}.{name}" for name in value.keys() - known.keys()]
        shared = value.keys() & known.keys()
        return here + [
            found
            for name in shared
            for found in strangers(value[name], known[name], f"{path}.{name}")
        ]
    if isinstance(value, list) and isinstance(known, list):
        pairs = zip(value, known, strict=True)
        return [found for one, other in pairs for found in strangers(one, other, f"{path}[]")]
    return []


@pytest.mark.parametrize("faults", [{}, {"flip_every": 2}, {"empty_every": 5}], ids=str)
async def test_every_field_that_is_written_is_documented(
    written: Written, faults: dict[str, int]
) -> None:
    """Suites write no field that the form does not know, and none of another type."""
    values = await written(**faults)

    report = convert_report(values)

    assert strangers(values, msgspec.to_builtins(report)) == []
    assert report.runs[0].all_requests
    assert report.runs[1].all_requests


def test_a_suite_that_cannot_run_here_is_documented() -> None:
    """It writes what is missing, and nothing that the form does not know."""
    values = {"schema": form.FORM, "passed": False, "runs": [NotApplicable("x", "why").to_dict()]}

    report = convert_report(values)

    assert strangers(values, msgspec.to_builtins(report)) == []
    assert report.runs[0].reason == "why"


def test_a_fleet_that_was_not_started_is_documented() -> None:
    """It writes which it was and why, and nothing that the form does not know."""
    missing = NotStarted("x", "TP 1", "TP 2", "refused", "why")
    values = {"schema": form.FORM, "passed": False, "runs": [missing.to_dict()]}

    report = convert_report(values)

    assert strangers(values, msgspec.to_builtins(report)) == []
    assert report.runs[0].fleet == {"prefill": "TP 1", "decode": "TP 2"}


async def test_what_is_written_obeys_the_schema(written: Written) -> None:
    """The published JSON Schema names every required field and the type of each."""
    values, schema = await written(), json_schema()

    assert schema["title"] == form.FORM
    run = schema["$defs"]["Run"]
    assert {"schema", "suite", "outcome", "passed"} == set(run["required"])
    assert values["runs"][0].keys() <= run["properties"].keys()
    assert (
        values["runs"][0]["requests"][0].keys() <= schema["$defs"]["Request"]["properties"].keys()
    )


def test_a_smallest_report_is_read(tmp_path: Path) -> None:
    """What is not required may be left out, and what is not known is passed over."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**SMALL, "more": 1}))

    assert read_report(path).runs[0].suite == "x"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "no JSON"),
        ("[]", "names no form"),
        ('{"schema": "kvkeep.check/9"}', "has the form 'kvkeep.check/9'"),
        (json.dumps({**SMALL, "runs": 3}), "no whole report"),
        (
            json.dumps(
                {
                    **SMALL,
                    "runs": [
                        {**SMALL["runs"][0], "requests": [
                            {"phase": "p", "prompt_id": "q", "verdict": "<b>"}
                        ]}
                    ],
                }
            ),
            "verdicts that this version does not know",
        ),
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, why: str) -> None:
    """One sentence says what is wrong with the file."""
    path = tmp_path / "r.json"
    path.write_text(text)

    with pytest.raises(InputError, match=why):
        read_report(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """One sentence names the file."""
    with pytest.raises(InputError, match=r"none\.json can't be read"):
        read_report(tmp_path / "none.json")


def test_every_field_has_a_text() -> None:
    """The table of the document has a row with a meaning for each field of each part."""
    rows = [line.split(" | ") for line in field_tables().splitlines() if line.startswith("| `")]

    assert len(rows) > 50
    assert all(row[3].rstrip("| ").strip() for row in rows)
