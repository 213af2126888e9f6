"""A cartridge as one file: safetensors that carry their manifest.

    | length | JSON: manifest, signature, their digest, places of tensors | tensors' bytes |

The header follows from manifest and signature alone, byte by byte, and the manifest holds the
SHA-256 of the tensors' bytes: a file in which any byte is another is refused. A file is written
whole or not at all. Readers never run anything in it, and take no more memory than it has bytes.

Other programs read the tensors ``layers.0.key``, ``layers.0.value``, ... with any safetensors
library; ``token_ids`` are the ids' bytes, int32 little-endian.
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from kvkeep.cartridges.contents import Contents, is_finite
from kvkeep.cartridges.manifest import (
    Draft,
    Expected,
    Manifest,
    check_expected,
    checked_manifest,
    parse_manifest,
)
from kvkeep.cartridges.signing import Signature, SigningKey, Standing, check_signature
from kvkeep.client.sequence_tensors import Tensor
from kvkeep.model.errors import CapacityError, CorruptDataError, InputError
from kvkeep.protocol import tensors
from kvkeep.protocol.sequence_body import KEY, VALUE, tensor_name

SUFFIX = ".safetensors"
TOKEN_IDS = "token_ids"
_Taker = Callable[[bytearray], None]
_MANIFEST, _SIGNATURE, _DIGEST = "kvkeep.manifest", "kvkeep.signature", "kvkeep.sha256"


@dataclass(frozen=True)
class Head:
    """What a file says before its tensors: read, and checked against itself."""

    manifest: Manifest
    digest: str
    """SHA-256 of manifest and signature, in hexadecimal digits: no other cartridge has it."""
    signer: str
    """Short name of the key that signed it; empty: none did."""
    standing: Standing
    """Of the signature."""
    file_bytes: int


@dataclass(frozen=True, eq=False)
class Cartridge:
    """A cartridge in memory, every byte of it checked."""

    head: Head
    contents: Contents


# ---- Writing


def write_cartridge(
    path: Path, draft: Draft, contents: Contents, signing_key: SigningKey | None = None
) -> Manifest:
    """Write a cartridge; an old file of that name is replaced at once.

    Raises:
        InputError: It can't be described so, or the place can't be written; what was there stays.
        CapacityError: The disk is full; what was there stays.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with told_of_writing(path):
        try:
            with part.open("wb") as file:
                manifest = write_into(file, draft, contents, signing_key)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return manifest


def write_into(
    file: BinaryIO, draft: Draft, contents: Contents, signing_key: SigningKey | None = None
) -> Manifest:
    """Write a cartridge into an empty file.

    Raises:
        InputError: It can't be described so; nothing was written.
        OSError: What writing raised; some of it was written.
    """
    manifest = _describe(draft, contents)
    text = manifest.encoded()
    signature = None if signing_key is None else signing_key.sign(text)
    file.write(_make_header(manifest, text, signature))
    for payload in _payloads(contents):
        file.write(payload)
    return manifest


@contextlib.contextmanager
def told_of_writing(path: Path) -> Iterator[None]:
    """Say what is wrong with a place, if writing there fails."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"there is no room for {path}: free some disk space") from error
        raise InputError(
            f"the cartridge can't be written to {path} ({error.strerror}): name another place"
        ) from error


def _describe(draft: Draft, contents: Contents) -> Manifest:
    num_tokens, num_heads, head_dim = contents.shape
    digest, num_bytes = hashlib.sha256(), 0
    for payload in _payloads(contents):
        digest.update(payload)
        num_bytes += len(payload)
    if draft.block_tokens < 1:
        raise InputError(f"block_tokens must be at least 1, not {draft.block_tokens}")
    num_blocks = num_tokens // draft.block_tokens
    return checked_manifest(
        Manifest(
            cartridge_id=draft.cartridge_id,
            model=draft.model,
            num_layers=len(contents.layers),
            num_heads=num_heads,
            head_dim=head_dim,
            dtype=contents.dtype,  # type: ignore[arg-type]  # looked at by both
            num_tokens=num_tokens,
            num_aligned_tokens=num_blocks * draft.block_tokens,
            block_tokens=draft.block_tokens,
            num_blocks=num_blocks,
            num_frozen_tokens=contents.num_frozen_tokens,
            has_token_ids=contents.token_ids is not None,
            sha256=digest.hexdigest(),
            num_bytes=num_bytes,
            created=draft.created,
            method=draft.method,
            num_training_steps=draft.num_training_steps,
            source=draft.source,
            made_by=draft.made_by,
            identity=dict(draft.identity),
            labels=dict(draft.labels),
        )
    )


def _payloads(contents: Contents) -> Iterator[memoryview]:
    for key, value in contents.layers:
        yield key.data
        yield value.data
    if contents.token_ids is not None:
        yield memoryview(contents.token_ids.astype("<i4").tobytes())


def _make_header(manifest: Manifest, text: bytes, signature: Signature | None) -> bytes:
    signed = b"" if signature is None else msgspec.json.encode(signature)
    metadata = {_MANIFEST: text.decode()}
    if signed:
        metadata[_SIGNATURE] = signed.decode()
    metadata[_DIGEST] = _digest(text, signed)
    header, _ = tensors.make_header(_places(manifest), metadata)
    return header


def _places(manifest: Manifest) -> list[tuple[str, str, tuple[int, ...]]]:
    """Tensors of a cartridge in the order of their bytes."""
    shape = (manifest.num_tokens, manifest.num_heads, manifest.head_dim)
    places: list[tuple[str, str, tuple[int, ...]]] = [
        (tensor_name(layer_idx, part), manifest.dtype, shape)
        for layer_idx in range(manifest.num_layers)
        for part in (KEY, VALUE)
    ]
    if manifest.has_token_ids:
        places.append((TOKEN_IDS, "uint8", (manifest.num_tokens, 4)))
    return places


def _digest(text: bytes, signed: bytes) -> str:
    # The length keeps what ends the one apart from what begins the other.
    return hashlib.sha256(len(text).to_bytes(8, "little") + text + signed).hexdigest()


# ---- Reading


def read_head(path: Path, trusted: Sequence[bytes] = ()) -> Head:
    """What a cartridge says of itself; the bytes of its tensors are not looked at.

    Args:
        path: Of the file.
        trusted: Public keys, one of which has to have signed it; none: it may be unsigned.

    Raises:
        InputError: It can't be read, or is of another form.
        CorruptDataError: It is no cartridge, truncated, or has another byte somewhere.
        RefusedError: It is not signed by one of these keys.
    """
    with _opened(path) as file:
        return _read_head(file, path, trusted)[0]


def read_cartridge(
    path: Path, *, expected: Expected | None = None, trusted: Sequence[bytes] = ()
) -> Cartridge:
    """Read a cartridge; no byte of it is handed out before all were checked.

    Args:
        path: Of the file.
        expected: What it has to be; compared before its tensors are read.
        trusted: Public keys, one of which has to have signed it; none: it may be unsigned.

    Raises:
        InputError: It can't be read, or is of another form.
        CorruptDataError: It is no cartridge, truncated, or has another byte somewhere.
        RefusedError: It is not what is expected, or not signed by one of these keys.
    """
    kept: list[bytearray] = []
    with _opened(path) as file:
        head = _read_checked(file, path, expected, trusted, kept.append)
    manifest = head.manifest
    shape = (manifest.num_tokens, manifest.num_heads, manifest.head_dim)
    views = [memoryview(payload).toreadonly() for payload in kept]
    both = [Tensor(manifest.dtype, shape, view) for view in views[: 2 * manifest.num_layers]]
    layers = tuple(zip(both[::2], both[1::2], strict=True))
    ids: npt.NDArray[np.int32] | None = None
    if manifest.has_token_ids:
        ids = np.frombuffer(views[-1], dtype="<i4")
    return Cartridge(head, Contents(layers, manifest.num_frozen_tokens, ids))


def verify_cartridge(
    path: Path, *, expected: Expected | None = None, trusted: Sequence[bytes] = ()
) -> Head:
    """Check every byte of a cartridge, one tensor in memory at a time.

    Raises:
        As `read_cartridge`.
    """
    with _opened(path) as file:
        return _read_checked(file, path, expected, trusted, lambda payload: None)


def copy_cartridge(path: Path, target: BinaryIO, *, trusted: Sequence[bytes] = ()) -> Head:
    """Copy a cartridge into an empty file, and check every byte that was copied.

    Raises:
        As `read_cartridge`; what was written before must not be used then.
        OSError: What writing raised.
    """

    def write(payload: bytearray) -> None:
        target.write(payload)

    with _opened(path) as file:
        head, header = _read_head(file, path, trusted)
        target.write(header)
        _read_tensors(file, path, head.manifest, write)
    return head


def export_cartridge(path: Path, target: Path) -> Head:
    """Copy a cartridge to another file, every byte checked; whole or not at all.

    Raises:
        As `read_cartridge`, and as `write_cartridge`; what was there stays.
    """
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    with told_of_writing(target):
        try:
            with part.open("wb") as file:
                head = copy_cartridge(path, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    return head


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        # Not to wait for the other end of a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:
        raise InputError(f"{str(path)!r} can't be a path: name another") from error
    except OSError as error:
        raise InputError(f"{path} can't be opened ({error.strerror}): name another") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"{path} is not a file: name another")
    with os.fdopen(fd, "rb") as file:
        yield file


def _read_checked(
    file: BinaryIO,
    path: Path,
    expected: Expected | None,
    trusted: Sequence[bytes],
    take: _Taker,
) -> Head:
    head, _ = _read_head(file, path, trusted)
    if expected is not None:
        check_expected(head.manifest, expected)
    _read_tensors(file, path, head.manifest, take)
    return head


def _read_head(file: BinaryIO, path: Path, trusted: Sequence[bytes]) -> tuple[Head, bytes]:
    """What a file says before its tensors, and the bytes in which it says so."""
    file_bytes = os.fstat(file.fileno()).st_size
    try:
        start = file.read(tensors.LENGTH_BYTES)
        header = start + file.read(tensors.parse_length(start))
        text, signed, digest = _parse_metadata(header[len(start) :])
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    except (InputError, msgspec.DecodeError, ValueError, RecursionError) as error:
        raise CorruptDataError(
            f"{path} is no cartridge, or damaged at its beginning: get it anew"
        ) from error
    if _digest(text, signed) != digest:
        raise CorruptDataError(f"the manifest of {path} has another checksum: get it anew")
    manifest = parse_manifest(text, str(path))
    signature = msgspec.json.decode(signed, type=Signature) if signed else None
    if _make_header(manifest, text, signature) != header:
        raise CorruptDataError(f"{path} does not lie as its manifest says: get the cartridge anew")
    if file_bytes != len(header) + manifest.num_bytes:
        raise CorruptDataError(
            f"{path} is truncated or longer than it was: it has {file_bytes} bytes, and its "
            f"manifest needs {len(header) + manifest.num_bytes}: get it anew"
        )
    standing = check_signature(text, signature, trusted, str(path))
    signer = "" if signature is None else signature.signer
    return Head(manifest, digest, signer, standing, file_bytes), header


class _Header(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name=tensors.METADATA)


def _parse_metadata(header: bytes) -> tuple[bytes, bytes, str]:
    """Manifest, signature (empty if there is none) and their digest, as they stand there.

    Raises:
        ValueError: They are not all there; ``msgspec.DecodeError`` is one.
    """
    metadata = msgspec.json.decode(header, type=_Header).metadata
    signed = metadata.get(_SIGNATURE, "").encode()
    if signed:
        msgspec.json.decode(signed, type=Signature)
    if _MANIFEST not in metadata or _DIGEST not in metadata:
        raise ValueError("there is no manifest")
    return metadata[_MANIFEST].encode(), signed, metadata[_DIGEST]


def _read_tensors(file: BinaryIO, path: Path, manifest: Manifest, take: _Taker) -> None:
    """Hand out the tensors' bytes one by one; what they are worth is known only at the end."""
    digest, not_finite = hashlib.sha256(), ""
    for name, dtype, shape in _places(manifest):
        num_bytes = int(np.prod(shape, dtype=np.int64)) * tensors.DTYPES[dtype][1]
        payload = _read_exactly(file, num_bytes, path)
        digest.update(payload)
        if name != TOKEN_IDS:
            tokens, heads, dim = shape
            tensor = Tensor(dtype, (tokens, heads, dim), memoryview(payload))
            not_finite = not_finite or ("" if is_finite(tensor) else name)
        take(payload)
    if digest.hexdigest() != manifest.sha256:
        raise CorruptDataError(f"the tensors of {path} have another checksum: get it anew")
    if not_finite:
        raise CorruptDataError(f"{not_finite} of {path} holds NaN or Inf: build it anew")


def _read_exactly(file: BinaryIO, num_bytes: int, path: Path) -> bytearray:
    payload = bytearray(num_bytes)
    room = memoryview(payload)
    done = 0
    while done < num_bytes:
        try:
            count = file.readinto(room[done:])  # type: ignore[attr-defined]  # as all files of os
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror})") from error
        if not count:
            raise CorruptDataError(f"{path} was truncated while it was read: get it anew")
        done += count
    return payload
