"""Contracts and doubles for people who write tiers, copiers and policies."""
