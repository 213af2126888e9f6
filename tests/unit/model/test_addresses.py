"""Hosts, ports and folders that a user writes."""

from pathlib import Path

import pytest

from kvkeep.model.addresses import (
    check_socket_path,
    checked_folder,
    checked_host,
    place_of,
    port_of,
    split_host_port,
    split_url,
)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("H.Example.", "h.example"),
        ("my_host-1", "my_host-1"),
        ("127.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0:0::0:1", "::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("a" * 63, "a" * 63),
    ],
)
def test_a_host_has_one_spelling(host: str, expected: str) -> None:
    """Whichever of them a user writes."""
    assert checked_host(host) == expected


@pytest.mark.parametrize(
    "host",
    [
        "",
        "a..b",
        "a b",
        " a",
        "-a",
        "a-",
        "a" * 64,
        "é" * 64,
        "1.2.3.999",
        "256.1",
        "1.2.3.4.5",
        "010.1",
        "4294967296",
        "%zz",
        "a:1",
    ],
)
def test_what_no_host_is_called_is_refused(host: str) -> None:
    """Nobody is asked for it."""
    with pytest.raises(ValueError, match="its host is no"):
        checked_host(host)


def test_this_machine_is_one_place() -> None:
    """Others are places of their own."""
    hosts = ["localhost", "LOCALHOST", "127.0.0.1", "::1", "0.0.0.0"]
    assert {place_of(checked_host(host)) for host in hosts} == {"localhost"}
    assert place_of(checked_host("10.0.0.1")) == "10.0.0.1"


@pytest.mark.parametrize(
    "text", ["h", "h:", ":1", "h:0", "h:65536", "h:x", "h:1:2", "a b:1", "h:\u06f5"]
)
def test_what_is_no_host_and_port_is_refused(text: str) -> None:
    """Each with a ValueError, never with another error."""
    with pytest.raises(ValueError, match=r"it has no host|its host is no"):
        split_host_port(text)


def test_a_host_and_port_are_read() -> None:
    """An IPv6 address with and without brackets."""
    assert split_host_port("H:1") == ("h", 1)
    assert split_host_port("[::1]:1") == split_host_port("::1:1") == ("::1", 1)


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://h:0", "http://h:99999", "http://h:x", "http://h\n:1"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    """Also where the standard library strips or raises."""
    with pytest.raises(ValueError, match=r"^its? .*(address|port|printed)"):
        port_of(split_url(url), 80)


@pytest.mark.parametrize("folder", ["", "a\0b", "~nobody-of-this-name/x", "a" * 256, "a/" * 2100])
def test_a_folder_that_can_not_be_is_refused(folder: str) -> None:
    """Before the system is asked for it."""
    with pytest.raises(ValueError, match=r"empty|zero byte|home|bytes"):
        checked_folder(folder)


def test_a_folder_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it has been made or not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("kv")
    spellings = [f"{tmp_path}/kv", f"{tmp_path}/./kv/", f"{tmp_path}/link", "~/kv"]
    assert {checked_folder(each) for each in spellings} == {f"{tmp_path.resolve()}/kv"}


@pytest.mark.parametrize("path", ["/" + "a" * 107, "/a\0b"])
def test_what_no_socket_is_called_is_refused(path: str) -> None:
    """The system would cut nothing: it refuses too, later."""
    with pytest.raises(ValueError, match="107 bytes"):
        check_socket_path(path)
