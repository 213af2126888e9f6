"""Servers behind a daemon's tiers that a stack starts itself."""
