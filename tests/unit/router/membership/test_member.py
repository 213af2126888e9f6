"""An engine as somebody announces it."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.router.membership.member import Member, parse_members, parse_url
from kvkeep.router.snapshot import Role


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("http://engine-1.local/", ("engine-1.local", 80)),
        ("http://[::1]:8000", ("::1", 8000)),
    ],
)
def test_an_address_is_host_and_port(url: str, address: tuple[str, int]) -> None:
    """What a connection needs, and nothing else."""
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000", "https://a:1", "http://", "http://a:99999", "http://a:b"),
        *("http://a/v1", "http://a?x=1", "http://a#b", "http://user@a", "http://a b"),
        *("http://a\r\nX: y", "http://a\nb:1", "http://[::1", "http://-a", "file:///etc/passwd"),
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    """The sentence shows how one looks."""
    with pytest.raises(ValueError, match="write one like"):
        parse_url(url)


def test_a_file_is_a_list_of_engines() -> None:
    """YAML, and so JSON too."""
    text = b"engines:\n- url: http://a:1\n- {url: 'http://b:2', name: b, role: decode, weight: 2}"
    first, second = parse_members(text, "fleet.yaml")

    assert (first.title, first.role) == ("a:1", Role.SERVE)
    assert second == Member(url="http://b:2", name="b", role=Role.DECODE, weight=2.0)
    assert parse_members(b'{"engines": []}', "fleet.json") == []


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"engines:", b"engines: 1", b"[]", b"engines: []\nmore: 1", b"engines: [1]"),
        *(b"engines: [{}]", b"engines: [{url: 'http://a', x: 1}]", b"\x00", b"a: [" * 5000),
        b"engines: [{url: 'http://a', role: king}]",
        b"engines: [{url: 'http://a', weight: 0}]",
        b"engines: [{url: 'http://a', name: 'x y'}]",
        b"engines: [{url: 'http://a', name: x}, {url: 'http://b', name: x}]",
        b"engines: [{url: 'http://a', name: x}, {url: 'http://a', name: y}]",
        b"engines: [" + b"{url: 'http://a'}," * 2000 + b"]",
    ],
)
def test_a_wrong_file_is_refused(text: bytes) -> None:
    """By its name, in one sentence."""
    with pytest.raises(InputError, match=r"fleet\.yaml") as caught:
        parse_members(text, "fleet.yaml")

    assert "\n" not in str(caught.value)
