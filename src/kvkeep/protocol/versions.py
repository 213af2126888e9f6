"""Versions of the wire format, and what each one changed."""

VERSION = 1
"""What this code speaks."""

SUPPORTED = frozenset({1})
"""What this code understands. A peer that speaks another is refused by name."""

CHANGES = {1: "first version"}
