"""Which engine gets which of a machine's GPUs, cores and ports."""
