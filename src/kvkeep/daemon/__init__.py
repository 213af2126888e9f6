"""The shell around the core: sockets, files, processes."""
