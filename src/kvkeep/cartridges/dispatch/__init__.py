"""Which cartridge a request gets: pure decisions, each with its reason."""
