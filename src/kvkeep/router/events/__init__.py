"""Where news of blocks comes from: which engine, and which tier of a daemon, holds what."""
