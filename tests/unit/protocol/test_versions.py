"""Versions of the wire format."""

from kvkeep.protocol.versions import CHANGES, SUPPORTED, VERSION


def test_this_code_understands_itself() -> None:
    """The version spoken is supported, and every supported one is described."""
    assert VERSION in SUPPORTED
    assert set(CHANGES) >= SUPPORTED
