"""Self-study: a short prefix of keys and values is trained to answer as the whole document does."""
