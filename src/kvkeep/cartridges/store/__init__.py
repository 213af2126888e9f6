"""Cartridges in use: which file a request's cartridge is, and which of its tokens are claimed."""
