"""The hot path: a byte-transparent HTTP/1.1 relay between clients and engines."""
