"""Which blocks of the pool are cartridges, and which of these stay."""
