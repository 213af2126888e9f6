"""One OpenAI-compatible address for a fleet of engines."""
