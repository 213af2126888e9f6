"""Certificates, and TLS in front of a server that speaks none."""

import contextlib
import select
import socket
import ssl
import threading
from pathlib import Path

import trustme

PIECE_BYTES = 1 << 16


class Certificates:
    """PEM files of a CA, of a server on loopback and of its clients."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        self.server_file, self.server_key_file = _issue(authority, folder, "127.0.0.1")
        self.client_file, self.client_key_file = _issue(authority, folder, "client")


def _issue(authority: trustme.CA, folder: Path, name: str) -> tuple[str, str]:
    issued = authority.issue_cert(name)
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    key.chmod(0o600)
    return str(certificate), str(key)


class TlsDoor:
    """Listens on loopback; what comes in by TLS goes on in clear."""

    def __init__(self, target: tuple[str, int], folder: Path) -> None:
        self._target = target
        authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """End; connections end with their clients."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._relay, args=(client,)))
            self._threads[-1].start()

    def _relay(self, client: socket.socket) -> None:
        # One thread for both directions: a TLS connection belongs to one at a time.
        with (
            client,
            contextlib.suppress(OSError),
            self._context.wrap_socket(client, server_side=True) as inside,
            socket.create_connection(self._target) as outside,
        ):
            while True:
                # Bytes that are decrypted already are nothing that select knows of.
                waited = [outside] if inside.pending() else [inside, outside]
                readable = select.select(waited, [], [], 0 if inside.pending() else None)[0]
                for source, sink in ((inside, outside), (outside, inside)):
                    if source in readable or (source is inside and inside.pending()):
                        data = source.recv(PIECE_BYTES)
                        if not data:
                            return
                        sink.sendall(data)
