"""Cartridges for programs that are no engines of kvkeep's; each module needs its program."""
