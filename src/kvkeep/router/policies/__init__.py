"""Which endpoint serves a request: one pure policy a file, behind the seam of ``base``."""
