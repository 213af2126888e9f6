"""What it costs to compute a prompt on one engine and to answer it on another."""
