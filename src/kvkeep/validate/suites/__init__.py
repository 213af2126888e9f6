"""One module a suite; each yields verdicts with evidence."""
