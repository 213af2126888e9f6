"""How an engine's own prefix cache keeps cartridges apart.

Two requests with the same tokens and different cartridges have different KV. vLLM mixes a request's
``cache_salt`` into its block hashes, and kvkeep into its keys: with the cartridge's digest in it
neither ever gives the KV of one to the other, nor to a request without any.
"""

from typing import Final

from kvkeep.model.errors import InputError

PREFIX: Final = "kvkeep-cartridge:"


def client_part(digest: str, salt: str | None) -> str | None:
    """What a client itself said, of a salt into which a router may have put its cartridge."""
    whole = PREFIX + digest
    if not salt or salt == whole:
        return None
    return salt.removeprefix(f"{whole}:") or None


def salted(digest: str, own: str | None = None) -> str:
    """The salt of a request that gets a cartridge; a salt that says so already stays as it is.

    Args:
        digest: Of the cartridge (``Head.digest``).
        own: The salt that the request came with; it goes on keeping the request apart.

    Raises:
        InputError: Its own salt is that of another cartridge.
    """
    whole = PREFIX + digest
    if not own:
        return whole
    if own.startswith(PREFIX):
        if own == whole or own.startswith(f"{whole}:"):
            return own
        raise InputError(
            f"cache_salt begins with {PREFIX} and is not of this request's cartridge: leave it out"
        )
    return f"{whole}:{own}"
