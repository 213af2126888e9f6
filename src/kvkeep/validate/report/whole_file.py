"""Writes a file whole or not at all."""

import os
from pathlib import Path

from kvkeep.model.errors import InputError


def write_whole(text: str, path: Path) -> None:
    """Write a text; folders are made, an old file is replaced at once.

    What no text file can hold, a half of a surrogate pair, becomes a question mark.

    Raises:
        InputError: The place can't be written. What was there stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(text.encode("utf-8", "replace"))
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"The report can't be written to {path} ({error.strerror}): name another place."
        ) from error
