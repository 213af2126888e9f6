"""What cartridges are worth."""
