"""Engines that start at the first request for their model, and stop when they are idle."""
