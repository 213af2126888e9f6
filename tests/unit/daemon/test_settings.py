"""Settings: where they come from, and one sentence for each that can't be."""

from pathlib import Path

import pytest

from kvkeep.daemon.settings import (
    DaemonSettings,
    load_settings,
    runtime_folder,
)
from kvkeep.model.errors import InputError
from kvkeep.model.settings.sources import FILE_BYTES_MAX
from kvkeep.model.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GiB", 2 << 30),
        ("512 MiB", 512 << 20),
        (" 1.5kib ", 1536),
        ("1GB", 10**9),
        ("7", 7),
        (9, 9),
    ],
)
def test_sizes_are_understood(text: object, num_bytes: int) -> None:
    """Binary and decimal units, in any case, with or without a space."""
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 gigs", "9" * 400, True, None, 1.5, [1]])
def test_what_is_no_size_is_refused(text: object) -> None:
    """Whatever a file or a flag can hold."""
    with pytest.raises(InputError, match="is not a size: write a number and a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "pool_byte: 1GiB",
            "'pool_byte' is not a setting of the daemon: choose from events_socket, eviction",
        ),
        ("1: 2", "'1' is not a setting"),
        (
            "metrics_port: 99999",
            "metrics_port = 99999 can't be: write a whole number of at most",
        ),
        ("lease_s_max: .nan", "lease_s_max = nan can't be: write a number above 0"),
        ("verify_on_start: maybe", "verify_on_start = 'maybe' can't be: write true or false"),
        ("socket: 5", "socket = 5 can't be: write text"),
        ("quotas: {a: 0.6, b: 0.5}", "quotas are more than 1 together: lower a share"),
        ("quotas: {a: .nan}", "quotas"),
        ("quotas: {a: 1.5}", "quotas[...] can't be so: write a number of at most 1"),
        ("quotas: {'': 0.5}", "a name in quotas can't be: write text of length 1 or more"),
        ("quotas: {others: 0.5}", "quotas can't name 'others'"),
        ("quotas: 0.5", "quotas = 0.5 can't be: write a mapping"),
        (
            "pool_bytes: 1KiB",
            "pool_bytes = 1024 can't be: write a whole number of at least 16",
        ),
        ("", "is not a mapping of settings"),
        ("- a", "is not a mapping of settings"),
        ("a: [", "is not YAML"),
        ("a: !!float x", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_bad_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    """It names what was written and what to write instead."""
    file = tmp_path / "d.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_settings(file, {}, {})

    assert sentence in str(caught.value)
    assert not set("\n`$") & set(str(caught.value))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """And so is the reason."""
    with pytest.raises(InputError, match=r"none.yaml can't be read: No such file"):
        load_settings(tmp_path / "none.yaml", {}, {})


def test_an_unknown_variable_is_refused_and_others_are_not_ours() -> None:
    """A misspelt setting would go unnoticed; variables of other programs are left alone."""
    assert load_settings(None, {"KVKEEP_ROUTER_PORT": "8080"}, {}) == load_settings(None, {}, {})
    with pytest.raises(InputError, match="KVKEEP_POOLBYTES is not a setting"):
        load_settings(None, {"KVKEEP_POOLBYTES": "1GiB"}, {})

    settings = load_settings(None, {"POOL_BYTES": "1GiB", "KVKEEP_VERIFY_ON_START": "false"}, {})
    assert settings == DaemonSettings(verify_on_start=False)


@pytest.mark.parametrize("path", ["/tmp/" + "x" * 120, "/tmp/a\0b"])
def test_a_path_that_no_socket_can_have_is_refused(path: str) -> None:
    """Before anything is created."""
    with pytest.raises(InputError, match=r"choose a shorter path|no zero byte"):
        load_settings(None, {}, {"socket": path})


def test_places_follow_from_the_user_and_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two daemons of one user share a pool only if they share the socket."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    one, other = DaemonSettings(socket="/a/b.sock"), DaemonSettings(socket="/a/c.sock")

    assert DaemonSettings().socket_path == str(runtime_folder() / "default.sock")
    assert one.pool_path != other.pool_path
    assert one.pool_path.parent == Path("/dev/shm")
    assert DaemonSettings(pool="/x/y").pool_path == Path("/x/y")


def test_a_file_without_an_end_is_refused() -> None:
    """A mistaken path costs a sentence, not the machine's memory."""
    with pytest.raises(InputError, match="is not a file"):
        load_settings(Path("/dev/zero"), {}, {})


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """Settings fit in a megabyte."""
    file = tmp_path / "daemon.yaml"
    file.write_bytes(b"#" * (FILE_BYTES_MAX + 1))

    with pytest.raises(InputError, match="larger than"):
        load_settings(file, {}, {})


def test_one_path_is_not_two_sockets() -> None:
    """Whichever came second would take it from the first."""
    with pytest.raises(InputError, match="events_socket is socket: give it a path of its own"):
        load_settings(None, {}, {"socket": "/tmp/a/../k", "events_socket": "/tmp/k"})
