"""kvkeep keeps the KV cache of LLM serving; see README.md."""

__version__ = "0.1.0"
