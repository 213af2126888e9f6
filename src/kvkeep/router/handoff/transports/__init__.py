"""How a prefill engine's blocks get to a decode engine."""
