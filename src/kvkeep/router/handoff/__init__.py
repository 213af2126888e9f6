"""Prefill on one engine, decode on another: the hand-off of a request between them."""
