"""The folder of result files, laid out as the reference document for several processes has it.

    RESULTS_DIR/
        lm_eval/first_run/  second_run/     samples_TASK_*.jsonl
        long_doc_qa/                        lmcache_result.json  baseline_result.json  *_output.txt
        vllm_bench/                         lmcache.json  baseline.json

The cache under test keeps the document's file name, ``lmcache``, whichever cache it is, so that
what reads these files goes on reading them.
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvkeep.model.errors import InputError
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.suite.base import Context, SuiteReport

CACHED = "lmcache"
"""Name of the files about the cache under test."""
BASELINE = "baseline"


def results_folder(settings: CheckSettings) -> Path:
    """Where result files go; nothing is made.

    ``${BUILD_ID}`` in the setting stands for the build's id.
    """
    build_id = settings.build_id or f"local_{time.strftime('%Y%m%d_%H%M%S')}"
    named = settings.results_dir
    if named is None:
        return Path(tempfile.gettempdir()) / f"kvkeep_check_results_{build_id}"
    return Path(named.replace("${BUILD_ID}", build_id)).expanduser()


def made(context: Context, *parts: str) -> Path | None:
    """A folder below the results folder, made if need be; None where none are written.

    Raises:
        InputError: It can't be made.
    """
    if context.results is None:
        return None
    folder = context.results.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The results folder {folder} can't be made ({error.strerror}): name another one with "
            "--results-dir."
        ) from error
    return folder


def write_result(folder: Path, name: str, result: Mapping[str, Any], report: SuiteReport) -> None:
    """Write one result file and note it in the report."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(dict(result), indent=1) + "\n", "utf-8")
    report.files[f"{folder.name}/{path.name}"] = str(path)


def write_lines(folder: Path, name: str, lines: Sequence[str], report: SuiteReport) -> None:
    """Write one text file and note it in the report."""
    path = folder / name
    path.write_text("\n".join(lines) + "\n", "utf-8")
    report.files[f"{folder.name}/{name}"] = str(path)
