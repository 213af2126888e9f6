"""Where a training lies while it is under way: a folder that a stopped one goes on from.

    training.json          what it was told, as a digest
    conversations.jsonl    what the model made up so far, whole batches
    state.pt               trained tensors, the optimizer's, and losses, at one step

Every file is replaced whole, so a training may be stopped, or killed, at any moment.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from kvkeep.authoring.training.self_study import Conversation
from kvkeep.model.errors import CapacityError, CorruptDataError, InputError

_NOTE, _CONVERSATIONS, _STATE = "training.json", "conversations.jsonl", "state.pt"


class _Note(msgspec.Struct):
    digest: str


class TrainingFolder:
    """The files of one training; made by `opened`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    # ---- Conversations

    def conversations(self) -> list[Conversation]:
        """Those made up so far.

        Raises:
            CorruptDataError: The file is damaged.
        """
        try:
            lines = (self._folder / _CONVERSATIONS).read_bytes().splitlines()
            return [msgspec.json.decode(line, type=Conversation) for line in lines]
        except FileNotFoundError:
            return []
        except msgspec.DecodeError as error:
            raise self._damaged(_CONVERSATIONS) from error

    def keep_conversations(self, made: Sequence[Conversation]) -> None:
        """Keep all that were made up so far."""
        self._replace(_CONVERSATIONS, b"".join(msgspec.json.encode(each) + b"\n" for each in made))

    # ---- State

    def state(self) -> dict[str, Any] | None:
        """What `keep_state` was given last; None: nothing yet.

        Raises:
            CorruptDataError: The file is damaged.
        """
        path = self._folder / _STATE
        if not path.exists():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, KeyError) as error:
            raise self._damaged(_STATE) from error
        if not isinstance(found, dict):
            raise self._damaged(_STATE)
        return found

    def keep_state(self, state: dict[str, Any]) -> None:
        """Keep where the training is, instead of where it was."""
        with self._told():
            part = self._folder / f"{_STATE}.part"
            torch.save(state, part)
            os.replace(part, self._folder / _STATE)

    # ----

    def check_digest(self, digest: str) -> None:
        """Note which training this is; refuse to go on with another one.

        Raises:
            InputError: The folder holds a training of other settings, another text or model.
        """
        try:
            note = msgspec.json.decode((self._folder / _NOTE).read_bytes(), type=_Note)
        except FileNotFoundError:
            self._replace(_NOTE, msgspec.json.encode(_Note(digest)))
            return
        except msgspec.DecodeError as error:
            raise self._damaged(_NOTE) from error
        if note.digest != digest:
            raise InputError(
                f"{self._folder} holds a training with other settings, another text or another "
                "model: name another --work folder, or remove this one"
            )

    def _replace(self, name: str, payload: bytes) -> None:
        with self._told():
            part = self._folder / f"{name}.part"
            part.write_bytes(payload)
            os.replace(part, self._folder / name)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise CapacityError(
                f"the training can't be kept in {self._folder} ({error}): free some disk space and "
                "run the same command again"
            ) from error

    def _damaged(self, name: str) -> CorruptDataError:
        return CorruptDataError(
            f"{self._folder / name} is damaged: remove the folder and train anew"
        )


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[TrainingFolder]:
    """The folder of a training, made if it is not there; one process at a time.

    Raises:
        InputError: It can't be made, or another process trains in it.
    """
    try:
        # A document can be guessed from its KV: nobody else may read it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"{folder} can't be used ({error.strerror}): name another --work folder"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process trains in {folder}: wait for it, or name another --work folder"
            ) from error
        yield TrainingFolder(folder)
