"""The local disk as a tier: preallocated segments of equal slots, and a header for each."""
