"""One rank of an engine: its memory, its copies, and its hold on a daemon."""
