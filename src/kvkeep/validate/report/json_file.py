"""Writes and reads a run's JSON report, whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvkeep.model.errors import InputError
from kvkeep.validate.report.whole_file import write_whole


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write a report; folders are made, an old report is replaced at once.

    Raises:
        InputError: The place can't be written. What was there stays.
    """
    write_whole(json.dumps(report, indent=1, ensure_ascii=False) + "\n", path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        InputError: It can't be read, or is none.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} can't be read as a report: name another, or remove it."
        ) from error
    if not isinstance(report, dict) or not isinstance(report.get("runs"), list):
        raise InputError(f"{path} is no report of kvkeep check: name another, or remove it.")
    return report
