"""A registry's cartridges as an engine asks for them: found, compared and checked off its threads.

A question is answered later, by a thread of the library's own: reading a large file takes seconds.
A file is checked byte by byte once; after that only whether it is still the same file.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs

from kvkeep.cartridges.file_format import read_cartridge
from kvkeep.cartridges.manifest import Expected, Manifest, check_expected
from kvkeep.cartridges.registry import Entry, Registry
from kvkeep.model.errors import CorruptDataError, InputError

THREADS_MAX = 2
"""One reads a new cartridge, another answers for those that are known."""
KNOWN_MAX = 256
"""Cartridges whose check is remembered."""

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Checked:
    """A cartridge every byte of which was read and compared."""

    path: Path
    digest: str
    """Of manifest and signature, in hexadecimal digits: no other cartridge has it."""
    manifest: Manifest
    token_ids: npt.NDArray[np.int32] | None
    """int32 ``[tokens]``; None of one that was trained."""
    is_pinned: bool


def default_folder() -> Path:
    """Where this user's registry lies."""
    return platformdirs.user_data_path("kvkeep") / "cartridges"


class Library:
    """Answers for the cartridges of one registry; its folder is opened with the first question."""

    def __init__(
        self,
        folder: Path,
        expected: Callable[[], Expected],
        *,
        models: Sequence[str] = (),
        trusted: Callable[[], Sequence[bytes]] = tuple,
    ) -> None:
        """Make a library.

        Args:
            folder: The registry's.
            expected: What the engine needs a cartridge to be; asked on the library's thread.
            models: Names under which the engine's model may be called by a cartridge.
            trusted: Gives public keys, one of which has to have signed a cartridge; none: it may
                be unsigned. Asked on the library's thread.
        """
        self._folder = folder
        self._expected = expected
        self._models = models
        self._trusted = trusted
        self._pool = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="kvkeep-cartridges")
        self._lock = threading.Lock()
        self._registry: Registry | None = None
        self._known: dict[str, tuple[_Stamp, Checked]] = {}

    def look_up(self, cartridge_id: str) -> "Future[Checked]":
        """Find and check a cartridge.

        Returns:
            Its result, or InputError (there is none), CorruptDataError, RefusedError (it does not
            go with this engine, or nobody trusted signed it), UnavailableError (the registry).
        """
        return self._pool.submit(self._find, cartridge_id)

    def close(self) -> None:
        """Answer nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._registry is not None:
                self._registry.close()

    def _find(self, cartridge_id: str) -> Checked:
        entry = self._open().get(cartridge_id)
        if entry is None:
            raise InputError(
                f"there is no cartridge {cartridge_id!r}: see kvkeep cartridge ls, and register it"
            )
        expected = self._expected_of(entry.manifest)
        # First what is known without the file: a wrong one is refused before it is opened.
        check_expected(entry.manifest, expected)
        stamp = _stamp_of(entry)
        with self._lock:
            known = self._known.get(entry.digest)
        if known is not None and known[0] == stamp:
            return replace(known[1], is_pinned=entry.is_pinned)
        checked = self._check(entry, expected)
        with self._lock:
            self._known[entry.digest] = (stamp, checked)
            while len(self._known) > KNOWN_MAX:
                del self._known[next(iter(self._known))]
        return checked

    def _check(self, entry: Entry, expected: Expected) -> Checked:
        cartridge = read_cartridge(entry.path, expected=expected, trusted=self._trusted())
        if cartridge.head.digest != entry.digest:
            raise CorruptDataError(
                f"{entry.path} holds another cartridge than was registered: register it anew"
            )
        ids = cartridge.contents.token_ids
        # A copy: what is kept must not hold all of the cartridge in memory.
        own = None if ids is None else np.array(ids, dtype=np.int32)
        return Checked(entry.path, entry.digest, cartridge.head.manifest, own, entry.is_pinned)

    def _expected_of(self, manifest: Manifest) -> Expected:
        expected = self._expected()
        if manifest.model in self._models:
            return replace(expected, model=manifest.model)
        return expected

    def _open(self) -> Registry:
        with self._lock:
            if self._registry is None:
                self._registry = Registry(self._folder)
            return self._registry


def _stamp_of(entry: Entry) -> _Stamp:
    try:
        stat = entry.path.stat()
    except OSError as error:
        raise InputError(
            f"the file of cartridge {entry.cartridge_id} is gone ({error.strerror}): register it "
            "anew"
        ) from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
