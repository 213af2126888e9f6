"""Cartridges on an engine: found for a request, brought to the pool, loaded instead of computed."""
