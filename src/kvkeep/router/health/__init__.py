"""Which endpoints may be asked: what requests and probes found, and what follows from it."""
