"""Who may ask, how often, and how many at once; what is beyond that is refused by name."""
