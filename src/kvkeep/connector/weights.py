"""Weights named by their bytes: two engines share KV only if the weight files they read are equal.

Reading 270 MB takes 30 ms from the page cache; large models cost one read at disk speed, done while
vLLM needs the same pages anyway, and remembered by path, size, inode and times of change.
"""

import glob
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import platformdirs
import xxhash

log = logging.getLogger(__name__)

_READ_BYTES = 16 << 20
_INDEX = "model.safetensors.index.json"
_MISTRAL_INDEX = "consolidated.safetensors.index.json"
_CONSOLIDATED = "consolidated*.safetensors"
_PATTERNS = {
    "auto": ("*.safetensors", "*.bin", "*.pt"),
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "instanttensor": ("*.safetensors",),
    "mistral": (_CONSOLIDATED,),
    "pt": ("*.pt",),
}
"""By load format: vLLM reads the files of the first pattern that matches any (vllm 0.26 to 0.33,
model_loader/default_loader.py, _prepare_weights)."""
_NOT_LOADED = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
"""Ends of names that vLLM passes by among .bin and .pt files (weight_utils.py,
filter_files_not_needed_for_inference)."""
_QUANTIZATION = "*quant*.json"
"""Files beside the weights that hold how they are quantized, where config.json does not."""


def is_known(load_format: str) -> bool:
    """Whether it is sure which files vLLM reads under this load format."""
    return load_format in _PATTERNS


def find_folder(model: str, revision: str | None, download_dir: str | None = None) -> Path | None:
    """The local folder that holds a model's files; None if it can't be found without a network."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() not in ("", "0", "false"):
        return None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        # The same arguments as vLLM's, so that the snapshot digested is the one it reads.
        return Path(
            snapshot_download(
                model, revision=revision, cache_dir=download_dir, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def weight_files(folder: Path, load_format: str) -> list[Path]:
    """The files that vLLM reads under this load format, by name; none if that is not sure.

    More than it reads is harmless, another choice than its own is not.
    """
    for pattern in _PATTERNS.get(load_format, ()):
        # vLLM's own call: pathlib also finds hidden files.
        names = sorted(glob.glob(os.path.join(folder, pattern)))
        if not names:
            continue
        if not pattern.endswith(".safetensors"):
            return [Path(name) for name in names if not name.endswith(_NOT_LOADED)]
        if load_format == "auto" and glob.glob(os.path.join(folder, _CONSOLIDATED)):
            # vLLM takes the consolidated files where it sees them among the repository's, and the
            # others where it can't list the repository: both are digested.
            return [Path(name) for name in names]
        return _in_index(names, folder, _INDEX if load_format != "mistral" else _MISTRAL_INDEX)
    return []


def _in_index(names: list[str], folder: Path, index: str) -> list[Path]:
    """What is left of safetensors files once those missing in the folder's index are passed by."""
    try:
        weight_map = json.loads((folder / index).read_text())["weight_map"]
        wanted = {os.path.join(folder, name) for name in weight_map.values()}
    except FileNotFoundError:
        return [Path(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    # vLLM does not start if one is missing.
    return [] if wanted - set(names) else [Path(name) for name in names if name in wanted]


def digest_weights(folder: Path, load_format: str) -> str | None:
    """XXH3-128 over names and bytes of what vLLM reads of a model's folder, as hex.

    Returns:
        None where it is not sure what vLLM reads, or nothing is there to be read.

    Raises:
        OSError: A file can't be read.
    """
    files = weight_files(folder, load_format)
    if not files:
        return None
    return digest_files([*files, *sorted(folder.glob(_QUANTIZATION))])


def digest_files(files: Iterable[Path]) -> str:
    """XXH3-128 over names and bytes of files, as hex.

    Raises:
        OSError: A file can't be read.
    """
    total = xxhash.xxh3_128()
    for path in files:
        total.update(path.name.encode() + b"\0" + _digest_file(path.resolve()))
    return total.hexdigest()


def stamp_of(path: Path, stat: os.stat_result) -> list[str | int]:
    """What changes when a file's bytes do; the time of change can't be set back by a copy."""
    return [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _digest_file(path: Path) -> bytes:
    stamp = stamp_of(path, path.stat())
    memory = Path(platformdirs.user_cache_dir("kvkeep")) / "weights"
    note = memory / f"{xxhash.xxh3_128_hexdigest(str(path).encode())}.json"
    try:
        known = json.loads(note.read_text())
        if known["stamp"] == stamp:
            return bytes.fromhex(known["digest"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
