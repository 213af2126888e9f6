"""What it takes to be let in by etcd: whom to trust, a certificate to show, a user's password."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from kvkeep.model.errors import InputError
from kvkeep.model.private_file import read_private, read_private_whole

KEY_BYTES_MAX = 1 << 20
PASSWORD_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True, eq=False)
class EtcdAccess:
    """What calls are made with; one for all servers of a cluster."""

    tls: ssl.SSLContext
    """Counts for addresses that begin with https."""
    user: str = ""
    """Empty: etcd is asked without a name."""
    password: str = field(default="", repr=False)
    tokens: dict[str, str] = field(default_factory=dict, repr=False)
    """By address: what a server gave for the password. They end, with time or with the server."""


def load_access(
    *,
    ca_file: str = "",
    cert_file: str = "",
    key_file: str = "",
    user: str = "",
    password_file: str = "",
) -> EtcdAccess:
    """Read the files; empty names are left out.

    Raises:
        InputError: One can't be used; the sentence names it.
    """
    return EtcdAccess(
        _make_context(ca_file, cert_file, key_file), user, _read_password(password_file)
    )


def _make_context(ca_file: str, cert_file: str, key_file: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=_path(ca_file) if ca_file else None)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise InputError(
            f"ca_file {ca_file!r} holds no certificates to trust: name a PEM file with etcd's CA"
        ) from error
    if not cert_file:
        return context
    # For its checks: whoever reads the key is this client.
    read_private(Path(_path(key_file)), "key file of etcd's client", KEY_BYTES_MAX)
    try:
        context.load_cert_chain(_path(cert_file), _path(key_file), lambda: b"")
    except (OSError, ValueError) as error:
        raise InputError(
            f"cert_file {cert_file!r} and key_file {key_file!r} are no certificate and its key: "
            "name PEM files that belong together, the key without a passphrase"
        ) from error
    return context


def _read_password(file: str) -> str:
    if not file:
        return ""
    path = Path(_path(file))
    text = read_private_whole(path, "password file of etcd", PASSWORD_BYTES_MAX)
    try:
        password = text.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        password = ""
    if not password or not password.isprintable():
        raise InputError(f"the password file of etcd {path} must hold the password on one line")
    return password


def _path(name: str) -> str:
    return str(Path(name).expanduser())
