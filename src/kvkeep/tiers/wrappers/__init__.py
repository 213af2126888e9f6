"""Concerns wrapped around any tier: proof, measurement, secrecy, size.

In which order, and why: docs/decisions/0013-wrappers.md.
"""
