"""Blocks between the pool and the tiers below it: cascade, promotion, and what decides them."""
