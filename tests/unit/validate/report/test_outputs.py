"""Every form that was asked for is written, and no other."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from kvkeep.validate.report.outputs import write_reports

Written = Callable[..., Awaitable[dict[str, Any]]]


async def test_what_is_asked_for_is_written(written: Written, tmp_path: Path) -> None:
    """JSON, page and XML, each at its place."""
    paths = {name: tmp_path / name for name in ("json_path", "html_path", "junit_path")}

    write_reports(await written(), **paths)

    assert sorted(os.listdir(tmp_path)) == sorted(paths)


async def test_nothing_else_is_written(written: Written, tmp_path: Path) -> None:
    """Without a path nothing happens."""
    write_reports(await written())

    assert os.listdir(tmp_path) == []
