"""Writes and reads a run's JSON report, whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvkeep.model.errors import InputError


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write a report; folders are made, an old report is replaced at once.

    Raises:
        InputError: The place can't be written. What was there stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"The report can't be written to {path} ({error.strerror}): name another place."
        ) from error


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
