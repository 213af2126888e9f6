"""What the scheduler side keeps of each request, and how it takes part in handoffs."""
