"""What is written down about a stack, and what is cleared by it."""

import fcntl
import os
import socket
from pathlib import Path

import msgspec
import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack import record as records
from kvkeep.stack.process import ProcessId, this_process
from kvkeep.stack.record import (
    DaemonRecord,
    FolderLock,
    ProcessRecord,
    StackRecord,
    await_record,
    bring_down,
    clear,
    clear_recorded,
    read_record,
    write_record,
)
from kvkeep.tiers.pool_inode import FILE_MAGIC

GONE = ProcessId(this_process().pid, 1)
"""Our pid with another beginning: a stranger that was given it later."""


def make(folder: Path, **fields: object) -> StackRecord:
    record = StackRecord(name="s", state="ready", supervisor=this_process(), model="m")
    record = msgspec.structs.replace(record, **fields)
    write_record(folder, record)
    return record


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """A record is read as it was written, and nothing else lies beside it."""
    record = make(tmp_path)

    assert read_record(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]


@pytest.mark.parametrize("text", [None, "", "{", '{"name": 1}'])
def test_what_can_t_be_read_is_no_record(tmp_path: Path, text: str | None) -> None:
    """A missing, torn or foreign record counts as none."""
    if text is not None:
        (tmp_path / "stack.json").write_text(text)

    assert read_record(tmp_path) is None


def test_a_folder_has_one_supervisor(tmp_path: Path) -> None:
    """A second stack in a folder is refused, and told how to end the first."""
    make(tmp_path)
    with FolderLock.taken(tmp_path), pytest.raises(InputError) as caught:
        FolderLock.taken(tmp_path)

    assert str(caught.value) == (
        f"The stack s is up already (process {os.getpid()}): `kvkeep down s` stops it."
    )


def test_a_lock_given_back_can_be_taken(tmp_path: Path) -> None:
    """Giving back twice is once."""
    lock = FolderLock.taken(tmp_path)
    lock.give_back()
    lock.give_back()

    FolderLock.taken(tmp_path).give_back()


def leave(folder: Path, *, keep_pool: bool = False) -> DaemonRecord:
    """What a crashed stack leaves: a record of a dead process, a socket, a pool."""
    daemon = DaemonRecord(
        socket=str(folder / "d.sock"),
        metrics_url="",
        pool=str(folder / "pool"),
        keep_pool=keep_pool,
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(daemon.socket)
    Path(daemon.pool).write_bytes(FILE_MAGIC)
    entry = ProcessRecord(name="engine a", process=GONE, reaper=GONE, log="")
    make(folder, supervisor=GONE, daemon=daemon, processes=[entry])
    return daemon


def test_a_stranger_s_process_is_left_alone(tmp_path: Path) -> None:
    """A pid that was given out again is not killed: this very test has it."""
    leave(tmp_path)

    assert clear(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", [b"precious", b"", None])
def test_what_is_no_pool_and_no_socket_stays(tmp_path: Path, what: bytes | None) -> None:
    """A file or folder of the user's at a recorded path is never removed; the record is."""
    daemon = leave(tmp_path)
    for path in (Path(daemon.socket), Path(daemon.pool)):
        path.unlink()
        path.mkdir() if what is None else path.write_bytes(what)

    clear(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {"d.sock", "pool"}


def test_sockets_that_nobody_answers_go(tmp_path: Path) -> None:
    """One that a program listens at now is somebody else's, and a file is no socket."""
    names = ["dead", "living", "file", "gone"]
    paths = [tmp_path / name for name in names]
    (tmp_path / "file").write_text("mine")
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as living:
        dead.bind(str(tmp_path / "dead"))
        dead.close()
        living.bind(str(tmp_path / "living"))
        living.listen()
        clear_recorded(tmp_path, make(tmp_path, sockets=[str(path) for path in paths]))

    assert [path.name for path in paths if path.exists()] == ["living", "file"]


def test_a_link_to_a_pool_stays(tmp_path: Path) -> None:
    """A pool is where its daemon made it, never behind a link."""
    daemon = leave(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    Path(daemon.pool).rename(elsewhere)
    Path(daemon.pool).symlink_to(elsewhere)

    clear(tmp_path)

    assert (Path(daemon.pool).is_symlink(), elsewhere.exists()) == (True, True)


@pytest.mark.parametrize("pool", ["", "/dev/null/x", "/dev"])
def test_a_path_that_can_t_be_does_not_poison_the_folder(tmp_path: Path, pool: str) -> None:
    """A record with an impossible pool is cleared like any other."""
    daemon = DaemonRecord(socket="", metrics_url="", pool=pool, keep_pool=False)
    make(tmp_path, supervisor=GONE, daemon=daemon)

    assert clear(tmp_path) == []
    assert read_record(tmp_path) is None


def test_a_file_that_can_t_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without the right to remove is said, and is no reason to stop half-way."""
    daemon = leave(tmp_path)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == Path(daemon.pool):
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    clear(tmp_path)

    assert read_record(tmp_path) is None
    assert f"{daemon.pool} can't be removed (Permission denied)" in capsys.readouterr().err


def test_a_later_stack_s_record_stays(tmp_path: Path) -> None:
    """Whoever lost its folder to another stack leaves that one's record."""
    mine = make(tmp_path, supervisor=GONE)
    theirs = make(tmp_path)

    clear_recorded(tmp_path, mine)

    assert read_record(tmp_path) == theirs


def test_a_kept_pool_is_kept(tmp_path: Path) -> None:
    """With `keep_pool` only the socket goes."""
    daemon = leave(tmp_path, keep_pool=True)

    clear(tmp_path)

    assert [str(path) for path in tmp_path.iterdir()] == [daemon.pool]


def test_a_living_daemon_s_files_stay(tmp_path: Path) -> None:
    """A daemon that is not ours holds locks on its socket and pool."""
    daemon = leave(tmp_path)
    lock_file = Path(f"{daemon.socket}.lock")
    with lock_file.open("w") as lock, Path(daemon.pool).open("r+") as pool:
        for file in (lock, pool):
            fcntl.flock(file, fcntl.LOCK_EX)
        clear(tmp_path)

    assert Path(daemon.socket).exists()
    assert Path(daemon.pool).exists()


def test_down_without_a_stack_does_nothing(tmp_path: Path) -> None:
    """Stopping what is not up makes no folder and is no error."""
    assert bring_down(tmp_path / "none") == []
    assert list(tmp_path.iterdir()) == []


def test_down_clears_what_a_crash_left_once(tmp_path: Path) -> None:
    """A crashed stack's record is cleared, and a second time nothing is there."""
    leave(tmp_path)

    assert (bring_down(tmp_path), bring_down(tmp_path)) == ([], [])
    assert [path.name for path in tmp_path.iterdir()] == ["stack.lock"]


def test_a_ready_stack_is_waited_for_no_longer(tmp_path: Path) -> None:
    """Waiting for a stack that is ready returns its record."""
    record = make(tmp_path)

    assert await_record(tmp_path, 1.0) == record


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (None, "No stack is up or starting in"),
        ({"state": "failed", "error": "No memory."}, "No memory."),
        ({"supervisor": GONE}, "The stack s crashed: its supervisor is gone"),
        ({"state": "starting", "doing": {"a": "loading"}}, "The stack was not ready after 0.2 s"),
    ],
)
def test_waiting_in_vain_ends_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, object] | None,
    sentence: str,
) -> None:
    """A stack that will not become ready is not waited for, and the reason is said."""
    monkeypatch.setattr(records, "APPEAR_S", 0.1)
    if fields is not None:
        make(tmp_path, **fields)

    with pytest.raises(UnavailableError, match=sentence):
        await_record(tmp_path, 0.2)
