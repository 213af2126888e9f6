"""Which cartridges stay in a memory that does not hold them all."""
