"""API keys: a file that nobody else may read, and what a request has to show.

A presented key is looked up by a digest under a secret of this process, so that neither the time
of the look-up nor of the comparison tells how much of a guess was right.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.model.plain import check_plain
from kvkeep.model.private_file import KEY_CHARS_MIN, read_private_whole

KEYS_MAX = 4096
FILE_BYTES_MAX = 1 << 20
KEY_CHARS_MAX = 1024
"""Whoever sends a longer one has none of ours."""
_SCHEME = b"bearer "

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One key, and what its holder may do."""

    name: Name
    """What it is called in logs and metrics; never the key itself."""
    key: str = ""
    """The key, at least 16 characters."""
    key_sha256: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?$")] = ""
    """Instead of ``key``: its SHA-256 in hexadecimal digits, so that the file holds no key."""
    requests_per_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    """Requests each second in the long run; 0: no limit."""
    burst: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    """Requests at once; 0: those of one second, and at least one."""
    prompt_tokens_per_min: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    """Prompt tokens each minute in the long run; 0: no limit."""
    prompt_tokens_burst: Annotated[int, msgspec.Meta(ge=0, le=10**12)] = 0
    """Prompt tokens at once; 0: those of one minute, and at least one."""
    in_flight_max: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    """Requests that run or wait at one time; 0: no limit."""

    def __repr__(self) -> str:
        return f"ApiKey(name={self.name!r})"

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key."""
        if self.key_sha256:
            return bytes.fromhex(self.key_sha256)
        return hashlib.sha256(self.key.encode()).digest()


class KeyRing:
    """Every key that is accepted; never changes."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        """Hold keys.

        Raises:
            InputError: There is none, one has no secret or two, or two are alike.
        """
        self._secret = os.urandom(32)
        self._by_tag: dict[bytes, tuple[bytes, ApiKey]] = {}
        names: set[str] = set()
        for key in keys:
            _check(key)
            tag = self._tag(key.digest)
            if key.name in names or tag in self._by_tag:
                raise InputError(f"the API key {key.name!r} is there twice: leave one out")
            names.add(key.name)
            self._by_tag[tag] = (key.digest, key)
        if not 1 <= len(names) <= KEYS_MAX:
            raise InputError(f"there are {len(names)} API keys: write 1 to {KEYS_MAX}")

    def __len__(self) -> int:
        return len(self._by_tag)

    @staticmethod
    def load(path: Path) -> "KeyRing":
        """Read a YAML list of keys from a file that only its owner may touch.

        Raises:
            InputError: It can't be read, is open to others, or says something else.
        """
        text = read_private_whole(path, "API key file", FILE_BYTES_MAX)
        try:
            values = msgspec.yaml.decode(text)
            check_plain(values, str(path))
            keys = msgspec.convert(values, list[ApiKey], strict=False)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            # What stands in the file may be a key: the complaint does not repeat it.
            raise InputError(
                f"the API key file {path} must be a YAML list of entries such as "
                f"'- {{name: team-a, key: ...}}' ({_without_values(error)})"
            ) from None
        return KeyRing(keys)

    def find(self, authorization: bytes | None) -> ApiKey | None:
        """The key that an ``Authorization: Bearer ...`` header's value shows; None if it is none.

        Takes the same time whatever is wrong with it.
        """
        shown = authorization or b""
        is_bearer = shown[: len(_SCHEME)].lower() == _SCHEME
        secret = shown[len(_SCHEME) :].strip() if is_bearer else b""
        digest = hashlib.sha256(secret[:KEY_CHARS_MAX]).digest()
        expected, key = self._by_tag.get(self._tag(digest), (b"", None))
        is_equal = hmac.compare_digest(expected, digest)
        return key if is_equal and len(secret) <= KEY_CHARS_MAX else None

    def _tag(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=16).digest()


def _check(key: ApiKey) -> None:
    if bool(key.key) == bool(key.key_sha256):
        raise InputError(f"the API key {key.name!r} needs one of key and key_sha256")
    is_fit = KEY_CHARS_MIN <= len(key.key) <= KEY_CHARS_MAX
    if key.key and not (
        is_fit and key.key.isascii() and key.key.isprintable() and " " not in key.key
    ):
        raise InputError(
            f"the API key {key.name!r} must have {KEY_CHARS_MIN} to {KEY_CHARS_MAX} characters, "
            "ASCII without spaces: make one with openssl rand -hex 24"
        )


def _without_values(error: Exception) -> str:
    """Where it is wrong, not what stands there."""
    found = re.search(r"at `\$[\w.\[\]]*`$", str(error))
    return found[0] if found else type(error).__name__
