"""A daemon under mixed load for long: nothing grows, nothing is wrong, nothing is lost."""
