"""Tiny models compute in one thread."""

from tests.unit.authoring.tiny import one_thread

__all__ = ["one_thread"]
