"""Engines that start at the first request for their model, and stop when they have nothing to do."""
