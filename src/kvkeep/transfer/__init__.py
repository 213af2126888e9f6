"""Moving bytes between memories, with a digest for each head page."""
