"""Sizes as people write them."""

import re
from fractions import Fraction

from kvkeep.model.errors import InputError

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
          "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}  # fmt: skip
_SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*$", re.IGNORECASE)


def parse_bytes(text: object) -> int:
    """A size such as ``2GiB``, ``512 MiB`` or ``1073741824`` in bytes.

    Raises:
        InputError: Not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.match(text) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise InputError(f"{text!r} is not a size: write a number and a unit, such as 2GiB")
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])
