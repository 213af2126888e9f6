"""Versions of the wire format, and what each one changed."""

VERSION = 4
"""What this code speaks."""

SUPPORTED = frozenset({4})
"""What this code understands. A peer that speaks another is refused by name."""

CHANGES = {
    1: "first version",
    2: "Welcome names the longest lease; an Acquire is answered again when blocks are on their "
    "way; tiers can be listed, verified and cleared, misses explained, and prefixes prefetched",
    3: "engines report how handoffs through the pool went",
    4: "engines say which blocks are a cartridge's; tools list and drop resident cartridges",
}
