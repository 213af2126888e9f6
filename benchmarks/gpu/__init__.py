"""Measurements that need a GPU host; see README.md beside this file."""
