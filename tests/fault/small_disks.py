"""Disks of a few MiB that are really full, or whose device really fails; they need root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.integration.daemons import wait_until

IMAGE_BYTES = 24 << 20
STORE_BYTES = 28 << 20
"""Of the memory that the image of a device lies in."""


@contextlib.contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[Path]:
    """A file system of its own for the time of a test."""
    place.mkdir()
    subprocess.run(["mount", *arguments, str(place)], check=True, capture_output=True, text=True)
    try:
        yield place
    finally:
        # A loop device lets go of the file behind it in its own time.
        wait_until(lambda: _is_unmounted(place), f"{place} is unmounted")


def _is_unmounted(place: Path) -> bool:
    return subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def small_tmpfs(place: Path, num_bytes: int = 16 << 20) -> Iterator[Path]:
    """Memory as a disk."""
    with mounted(place, "-t", "tmpfs", "-o", f"size={num_bytes}", "none"):
        yield place


@contextlib.contextmanager
def small_ext4(place: Path, image: Path, *, errors: str = "remount-ro") -> Iterator[Path]:
    """A device in a file, with a file system."""
    image.touch()
    os.truncate(image, IMAGE_BYTES)
    # With a journal, errors of its own writes would end the file system for good.
    features = ("-O", "^has_journal") if errors == "continue" else ()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", *features, str(image)], check=True)
    with mounted(place, "-t", "ext4", "-o", f"loop,errors={errors}", str(image)):
        yield place


def fill(path: Path) -> None:
    """Write until nothing fits any more."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for num_bytes in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, bytes(num_bytes))
    finally:
        os.close(fd)


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """A disk without any room."""
    fill(disk / "filler")
    try:
        yield
    finally:
        (disk / "filler").unlink()


@contextlib.contextmanager
def failing_disk(folder: Path) -> Iterator[Path]:
    """A disk for ``lost_end``."""
    with (
        small_tmpfs(folder / "store", STORE_BYTES) as store,
        small_ext4(folder / "disk", store / "image", errors="continue") as disk,
    ):
        yield disk


@contextlib.contextmanager
def lost_end(disk: Path, mark: bytes) -> Iterator[None]:
    """A device that has lost its end, from these bytes on: what lies there fails with EIO.

    The file behind the device is cut there, and the room that it had is taken, so that it can be
    neither read nor written.
    """
    store = disk.parent / "store"
    image = store / "image"
    subprocess.run(["sync", "--file-system", str(disk)], check=True)
    data = image.read_bytes()
    start = data.find(mark)
    assert start >= 0
    start -= start % 4096
    os.truncate(image, start)
    try:
        with filled(store):
            yield
    finally:
        with image.open("r+b") as file:
            file.seek(start)
            file.write(data[start:])
