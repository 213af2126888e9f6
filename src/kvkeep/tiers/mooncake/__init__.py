"""Blocks in Mooncake Store, through a client in a process of its own."""
