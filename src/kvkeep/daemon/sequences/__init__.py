"""Named sequences' K/V over HTTP, for engines and tools that are not vLLM."""
