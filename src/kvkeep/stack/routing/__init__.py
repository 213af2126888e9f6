"""The router of a stack: what its section says, how it runs, and engines that it has started."""
