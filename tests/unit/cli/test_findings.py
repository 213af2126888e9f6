"""What is found out about a machine, with the machine's answers put in."""

import fcntl
import os
import platform
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.cli import findings
from kvkeep.cli.findings import Level
from kvkeep.daemon.settings import DaemonSettings


def levels(monkeypatch: pytest.MonkeyPatch, kernel: str, vllm: str | None) -> dict[str, Level]:
    """Of the versions, on a machine with these."""
    monkeypatch.setattr(platform, "release", lambda: kernel)
    monkeypatch.setattr(findings, "_version", lambda name: vllm if name == "vllm" else None)
    return {each.what: each.level for each in findings.find_versions()}


@pytest.mark.parametrize(
    ("kernel", "vllm", "found"),
    [
        ("6.1.0-13-amd64", "0.32.0", (Level.OK, Level.OK)),
        ("5.2.9", "0.26.0", (Level.FAIL, Level.OK)),
        ("5.10.0", "0.25.1", (Level.OK, Level.WARN)),
        ("5.3", None, (Level.OK, Level.WARN)),
    ],
)
def test_versions_have_limits(
    monkeypatch: pytest.MonkeyPatch, kernel: str, vllm: str | None, found: tuple[Level, Level]
) -> None:
    """An old kernel fails, another vLLM is a warning."""
    told = levels(monkeypatch, kernel, vllm)

    assert (told["kernel"], told["vllm"]) == found


def test_a_pool_larger_than_shared_memory_fails(tmp_path: Path) -> None:
    """Unless a daemon serves: then it has its memory already."""
    settings = DaemonSettings(pool_bytes=1 << 46, pool=str(tmp_path / "pool"))
    (found, *_) = findings.find_memory(settings, is_serving=False)
    (served, *_) = findings.find_memory(settings, is_serving=True)

    assert found.level is Level.FAIL
    assert "lower pool_bytes" in found.mend
    assert served.level is Level.OK


def test_too_few_open_files_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the daemon would refuse to start for."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 400))
    (found,) = findings.find_limits(DaemonSettings(sessions_max=256))

    assert found.level is Level.FAIL
    assert "768 needed" in found.text


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_port_in_use_fails() -> None:
    """A free one is well, and so is one that is chosen later."""
    with socket.socket() as taken:
        taken.bind((findings.HOST, 0))
        taken.listen(1)
        port = taken.getsockname()[1]

        assert findings.find_port("p", port).level is Level.FAIL
    assert findings.find_port("p", port).level is Level.OK
    assert findings.find_port("p", 0).level is Level.OK


def test_what_lies_at_a_socket_s_path_is_told_apart(tmp_path: Path) -> None:
    """Nothing, a file of somebody's, a frozen daemon."""
    path = tmp_path / "d.sock"
    none = findings.find_socket(path)
    path.write_text("mine")
    other = findings.find_socket(path)
    path.unlink()
    lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    frozen = findings.find_socket(path)
    os.close(lock)

    assert (none.level, other.level, frozen.level) == (Level.WARN, Level.FAIL, Level.FAIL)
    assert "does not answer" in frozen.text
    assert findings.find_socket(path).level is Level.WARN


@pytest.mark.parametrize(
    ("module", "find"),
    [
        ("kvkeep.transfer._pages", findings.find_copier),
        ("kvkeep.router.relay.plain._plain", findings.find_recognizer),
    ],
)
def test_a_compiled_helper_that_was_not_built_is_told(
    monkeypatch: pytest.MonkeyPatch, module: str, find: Callable[[], findings.Finding]
) -> None:
    """Everything works without, slower; the mend is a compiler."""
    assert find().level is Level.OK
    monkeypatch.setitem(sys.modules, module, None)
    found = find()

    assert found.level is Level.WARN
    assert "gcc" in str(found)


@pytest.mark.timeout(10)
def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody writes to it, and it holds no lock."""
    path = tmp_path / "lock"
    os.mkfifo(path)

    assert not findings.is_locked(path)
