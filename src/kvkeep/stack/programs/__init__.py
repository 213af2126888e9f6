"""Programs that a stack runs as processes of their own; nothing imports torch but here."""
