"""Start, watch and stop a whole stack from one file: daemon and engines."""
