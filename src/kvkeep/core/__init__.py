"""Decisions: pure and synchronous, no I/O, clock or chance."""
