"""Who is on this machine."""

import pytest

from kvkeep.model.loopback import is_loopback, names_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_this_machine(host: str) -> None:
    """Addresses that nobody else reaches."""
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.test", ""])
def test_elsewhere(host: str) -> None:
    """Addresses that others reach, and names that anybody can make."""
    assert not is_loopback(host)


@pytest.mark.parametrize("header", ["127.0.0.1:80", "localhost", "[::1]:80", "[::1]", "::1"])
def test_a_host_header_of_this_machine(header: str) -> None:
    """With and without a port."""
    assert names_loopback(header)


@pytest.mark.parametrize("header", ["evil.test", "evil.test:80", "127.0.0.1.evil.test", "", ":80"])
def test_a_host_header_of_somebody_else(header: str) -> None:
    """A web page's own name may lead to this machine; it is refused by that name."""
    assert not names_loopback(header)
