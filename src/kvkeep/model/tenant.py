"""A tenant: a name that anyone may know, and a secret that only its engines hold.

The name separates blocks and says whose share of the pool they take; the secret keys the chain of
block hashes, so that nobody without it can compute, guess or ask for a hash from token ids. BLAKE2b
with a key is a message authentication code as HMAC is, in one pass (RFC 7693, section 2.9).
"""

import hashlib
from dataclasses import dataclass, field

SECRET_BYTES = 32
TAG_BYTES = 8


def tag_of(name: str) -> bytes:
    """What stands for a tenant's name in its namespaces: ``TAG_BYTES`` bytes, never all zeros.

    Two names that meet by chance share a share of the pool, nothing else.
    """
    return hashlib.blake2b(name.encode(), digest_size=TAG_BYTES, person=b"kvkeep tenant 1").digest()


@dataclass(frozen=True, slots=True)
class TenantSecret:
    """``SECRET_BYTES`` bytes; what is derived of them says nothing about them, or each other."""

    _secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self._secret) != SECRET_BYTES:
            raise ValueError(f"a tenant's secret has {SECRET_BYTES} bytes")

    def _derive(self, purpose: bytes) -> bytes:
        return hashlib.blake2b(key=self._secret, digest_size=32, person=purpose).digest()

    @property
    def chain_key(self) -> bytes:
        """Keys block hashes; as secret as the secret itself."""
        return self._derive(b"kvkeep chain 1")

    @property
    def fingerprint(self) -> str:
        """Equal for equal secrets; may be logged, shown and sent."""
        return self._derive(b"kvkeep print 1")[:16].hex()

    def __str__(self) -> str:
        return f"tenant secret {self.fingerprint}"
