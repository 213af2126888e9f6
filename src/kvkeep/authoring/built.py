"""KV that was made here, with what its manifest has to say of it."""

from dataclasses import dataclass

from kvkeep.cartridges.contents import Contents


@dataclass(frozen=True)
class Built:
    """Contents of a cartridge that nobody has named yet."""

    contents: Contents
    identity: dict[str, str]
    """See ``Manifest.identity``; empty where it can't be known."""
    num_training_steps: int = 0
