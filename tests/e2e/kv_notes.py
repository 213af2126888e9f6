"""What ranks of engines note of their KV: written inside engines, read by tests."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

FOLDER_VARIABLE = "WATCHED_KV_FOLDER"
"""Names an engine's folder: a file for each of its ranks, a line for each block, as they come."""

What = Literal["stored", "loaded"]
Pages = list[list[str]]
"""Digests of a block's head pages, ``[layers][heads]``."""


def note_of(what: What, rank: int, block: str, pages: Pages) -> str:
    """One line.

    Args:
        what: Became of the block.
        rank: Who notes it.
        block: Its hash.
        pages: With the heads of this rank.
    """
    return json.dumps({"what": what, "rank": rank, "block": block, "pages": pages}) + "\n"


def read_notes(folder: Path, what: What, num_ranks: int) -> dict[str, Pages]:
    """Blocks by hash, with the heads of all ranks; those that not all have noted yet are left out.

    What was noted last of a block counts.
    """
    found: dict[str, dict[int, Pages]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n") and (note := json.loads(line))["what"] == what:
                found.setdefault(note["block"], {})[note["rank"]] = note["pages"]
    return {
        block: _joined([pages for _, pages in sorted(by_rank.items())])
        for block, by_rank in found.items()
        if len(by_rank) == num_ranks
    }


def _joined(by_rank: Sequence[Pages]) -> Pages:
    """One block with the heads of all ranks, layer by layer."""
    return [list(itertools.chain(*layers)) for layers in zip(*by_rank, strict=True)]
