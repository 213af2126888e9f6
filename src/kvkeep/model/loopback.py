"""Who may ask without a key: whoever is on this machine, and is no web page."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def names_loopback(host_header: str) -> bool:
    """Whether a ``Host`` header, with or without a port, names this machine.

    A name of somebody else's that leads here is how a web page gets past the browser's own rules.
    """
    name = host_header.rpartition(":")[0] or host_header
    return is_loopback(name) or is_loopback(host_header)
