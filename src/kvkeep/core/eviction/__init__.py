"""Which blocks make room for others."""
