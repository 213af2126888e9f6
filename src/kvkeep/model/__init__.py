"""Values, names and settings: no sockets, no threads, no clock but its own."""
