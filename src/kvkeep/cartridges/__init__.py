"""Named, pinned prefixes with a manifest: their files, and the registry of a host."""
