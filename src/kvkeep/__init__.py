"""kvkeep keeps the KV cache of LLM serving; see README.md."""
