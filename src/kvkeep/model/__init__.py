"""Values and names; standard library only."""
