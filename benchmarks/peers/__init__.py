"""Other ways to keep KV outside the engine, set up to be measured beside kvkeep."""
