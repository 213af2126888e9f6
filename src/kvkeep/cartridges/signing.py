"""Who made a cartridge: an Ed25519 signature over its manifest, which holds the digest of its KV.

Keys are PEM files as OpenSSL makes them: ``openssl genpkey -algorithm ed25519 -out maker.key``
(chmod 600), and ``openssl pkey -in maker.key -pubout -out maker.pub`` for those who check.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kvkeep.model.errors import CorruptDataError, InputError, RefusedError
from kvkeep.model.private_file import read_private_whole

_SIGNED = b"kvkeep cartridge 1\0"
"""Before every signed text, so that no signature made for something else passes here."""
KEY_FILE_BYTES_MAX = 4096

Standing = Literal["unsigned", "unchecked", "signed", "trusted"]
"""Of a signature: there is none; there is one and no package to check it; it is right, by a key
that nobody asked about; it is right, by a key that was asked for."""


class Signature(msgspec.Struct, frozen=True):
    """As it stands in a file, in hexadecimal digits."""

    public_key: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    signature: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]

    @property
    def signer(self) -> str:
        """Short name of the key, for people."""
        return signer_of(bytes.fromhex(self.public_key))


def signer_of(public_key: bytes) -> str:
    """Short name of a public key: 16 hexadecimal digits."""
    return hashlib.sha256(public_key).hexdigest()[:16]


class SigningKey:
    """A private key."""

    def __init__(self, key: Any) -> None:
        """Hold a key of the package ``cryptography``."""
        self._key = key

    @staticmethod
    def load(path: Path) -> "SigningKey":
        """Read a PEM file that nobody else may read.

        Raises:
            InputError: It can't be read, is open to others, or holds no Ed25519 key.
        """
        text = read_private_whole(path, "signing key", KEY_FILE_BYTES_MAX)
        ed25519, serialization, refusals = _library()
        try:
            key = serialization.load_pem_private_key(text, password=None)
        except refusals as error:
            raise _no_key(path, "private") from error
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise _no_key(path, "private")
        return SigningKey(key)

    def sign(self, text: bytes) -> Signature:
        """Sign a manifest as it is written."""
        public = self._key.public_key().public_bytes_raw()
        return Signature(public.hex(), self._key.sign(_SIGNED + text).hex())


def load_public_key(path: Path) -> bytes:
    """The 32 bytes of a public key, from a PEM file.

    Raises:
        InputError: It can't be read, or holds no Ed25519 key.
    """
    ed25519, serialization, refusals = _library()
    try:
        with path.open("rb") as file:
            key = serialization.load_pem_public_key(file.read(KEY_FILE_BYTES_MAX))
    except OSError as error:
        raise InputError(f"the public key {path} can't be read ({error.strerror})") from error
    except refusals as error:
        raise _no_key(path, "public") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _no_key(path, "public")
    return bytes(key.public_bytes_raw())


def check_signature(
    text: bytes, signature: Signature | None, trusted: Sequence[bytes], source: str
) -> Standing:
    """Whether a manifest was signed by one of these keys, or by any where none are named.

    Args:
        text: The manifest as it stands in the file.
        signature: What stands beside it.
        trusted: Public keys, 32 bytes each; none: whatever is there has to be right.
        source: Where it comes from, for the sentence.

    Raises:
        RefusedError: Keys are named, and it is not signed, or by another.
        CorruptDataError: The signature is not this manifest's.
        InputError: Keys are named, and the package that checks is not installed.
    """
    if signature is None:
        if trusted:
            raise RefusedError(f"the signature of {source} is missing: get one signed by its maker")
        return "unsigned"
    public = bytes.fromhex(signature.public_key)
    if trusted and public not in trusted:
        raise RefusedError(
            f"the signature of {source} is by the key {signature.signer}, which is not among the "
            "trusted ones: get its public key from its maker and name it"
        )
    try:
        ed25519, _, refusals = _library()
    except InputError:
        if trusted:
            raise
        return "unchecked"
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(public)
        key.verify(bytes.fromhex(signature.signature), _SIGNED + text)
    except refusals as error:
        raise CorruptDataError(
            f"the signature of {source} is not that of its manifest: do not use it"
        ) from error
    return "trusted" if trusted else "signed"


def _library() -> tuple[Any, Any, tuple[type[Exception], ...]]:
    """Keys, their files, and what a wrong one raises."""
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise InputError(
            "signatures need cryptography, which is not installed: pip install kvkeep[encryption]"
        ) from error
    return ed25519, serialization, (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError)


def _no_key(path: Path, kind: str) -> InputError:
    return InputError(
        f"{path} holds no Ed25519 {kind} key in PEM without a password: make one with "
        "openssl genpkey -algorithm ed25519"
    )
