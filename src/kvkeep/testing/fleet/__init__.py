"""A fleet of simulated engines behind a routing policy, in virtual time and from one seed."""
