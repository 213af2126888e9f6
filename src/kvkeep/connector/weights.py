"""Weights named by their bytes: two engines share KV only if their weight files are equal.

Reading 270 MB takes 30 ms from the page cache; large models cost one read at disk speed, done while
vLLM needs the same pages anyway, and remembered by path, size and time of change.
"""

import json
import logging
import os
import tempfile
from pathlib import Path

import platformdirs
import xxhash

log = logging.getLogger(__name__)

_READ_BYTES = 16 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def find_weights(model: str, revision: str | None) -> Path | None:
    """The local folder that holds a model's files; None if it can't be found without a network."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
        except ImportError:
            return None
        try:
            folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return None
    return folder if has_weights(folder) else None


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weight files: without one its digest says nothing."""
    return bool(_weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    """The files of the first format that is there, by name: vLLM loads one format, not all."""
    for pattern in _WEIGHTS:
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if files:
            return files
    return []


def digest_folder(folder: Path) -> str:
    """XXH3-128 over names and bytes of a folder's weight files, as hex.

    Raises:
        OSError: A file can't be read.
    """
    total = xxhash.xxh3_128()
    for path in _weight_files(folder):
        total.update(path.name.encode() + b"\0" + _digest_file(path.resolve()))
    return total.hexdigest()


def _digest_file(path: Path) -> bytes:
    stat = path.stat()
    stamp = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    memory = Path(platformdirs.user_cache_dir("kvkeep")) / "weights"
    note = memory / f"{xxhash.xxh3_128_hexdigest(str(path).encode())}.json"
    try:
        known = json.loads(note.read_text())
        if known["stamp"] == stamp:
            return bytes.fromhex(known["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never digested, or the note is not ours: read the file
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    _remember(note, json.dumps({"stamp": stamp, "digest": digest.hexdigest()}))
    return digest.digest()


def _remember(note: Path, text: str) -> None:
    """Write a note whole or not at all; without it the next start reads the file again."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(fd, "w") as file:
            file.write(text)
        os.replace(name, note)
    except OSError as error:
        log.info("digest not remembered. path=%s error=%s", note, error)
