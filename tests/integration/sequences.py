"""Daemons that keep sequences, and arrays of which every bit is known."""

import contextlib
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvkeep.client.sequence_tensors import Tensor, as_tensor
from kvkeep.client.sequences import SequenceClient
from kvkeep.protocol.sequence_body import KEY, VALUE, tensor_name
from kvkeep.protocol.tensors import make_header
from tests.integration.daemons import CALL_TIMEOUT_S, Daemon, running_daemon

KEY_TEXT = "a-key-of-these-tests"
HEADS, DIM = 2, 8

Layers = dict[int, tuple[Tensor, Tensor]]


@contextlib.contextmanager
def running_listener(*, has_key: bool = False, **section: object) -> Iterator[Daemon]:
    """A daemon that keeps sequences."""
    with tempfile.TemporaryDirectory(prefix="kvkeep-sequences-") as folder:
        file = Path(folder) / "daemon.yaml"
        if has_key:
            key = Path(folder) / "key"
            key.touch(0o600)
            key.write_text(KEY_TEXT)
            section["key_file"] = str(key)
        file.write_bytes(msgspec.yaml.encode({"sequences": section}))
        with running_daemon(config=file) as daemon:
            yield daemon


def url_of(daemon: Daemon) -> str:
    """Where a daemon's listener is."""
    return f"http://127.0.0.1:{daemon.ready['sequences_port']}"


def client_of(
    daemons: Mapping[str, Daemon], *, deadline_s: float = CALL_TIMEOUT_S, key: str = ""
) -> SequenceClient:
    """A client of these daemons, by name."""
    urls = {name: url_of(daemon) for name, daemon in daemons.items()}
    return SequenceClient(urls, deadline_s=deadline_s, key=key)


def tensor(seed: int, num_tokens: int, dtype: str = "bfloat16") -> Tensor:
    """Any bits: different for each seed."""
    width: npt.DTypeLike = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}.get(
        dtype, np.uint8
    )
    bits: npt.NDArray[Any] = np.random.default_rng(seed).integers(
        0, np.iinfo(width).max, (num_tokens, HEADS, DIM), dtype=width, endpoint=True
    )
    if dtype in ("float32", "float16", "int8", "uint8"):
        return as_tensor(bits.view(dtype))
    return as_tensor(bits, dtype)


def layers(seed: int, num_tokens: int, num_layers: int = 2, dtype: str = "bfloat16") -> Layers:
    """Keys and values of some layers: no two alike."""
    return {
        layer_idx: (
            tensor(1000 * seed + 2 * layer_idx, num_tokens, dtype),
            tensor(1000 * seed + 2 * layer_idx + 1, num_tokens, dtype),
        )
        for layer_idx in range(num_layers)
    }


def joined(*all_layers: Layers) -> Layers:
    """What appending one after another makes."""
    found: Layers = {}
    for more in all_layers:
        for layer_idx, pair in more.items():
            before = found.get(layer_idx)
            found[layer_idx] = (
                pair
                if before is None
                else (_behind(before[0], pair[0]), _behind(before[1], pair[1]))
            )
    return found


def _behind(one: Tensor, other: Tensor) -> Tensor:
    shape = (one.shape[0] + other.shape[0], *one.shape[1:])
    return Tensor(one.dtype, shape, memoryview(bytes(one.data) + bytes(other.data)))


def body_of(made: Layers) -> bytes:
    """The body that holds these layers, as a client sends it."""
    named = [
        (tensor_name(layer_idx, part), each)
        for layer_idx, pair in made.items()
        for part, each in zip((KEY, VALUE), pair, strict=True)
    ]
    header, _ = make_header([(name, each.dtype, each.shape) for name, each in named])
    return header + b"".join(bytes(each.data) for _, each in named)


@contextlib.contextmanager
def raw_connection(daemon: Daemon) -> Iterator[socket.socket]:
    """A connection on which a test says what it wants."""
    address = ("127.0.0.1", daemon.ready["sequences_port"])
    with socket.create_connection(address, CALL_TIMEOUT_S) as sock:
        yield sock


def head_of(method: str, path: str, num_bytes: int | None = None, *more: str) -> bytes:
    """The head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *more]
    if num_bytes is not None:
        lines.append(f"Content-Length: {num_bytes}")
    return "\r\n".join([*lines, "", ""]).encode()


def status_of(daemon: Daemon, request: bytes) -> tuple[int, bytes]:
    """Send a request alone on a connection; status and everything that came."""
    with raw_connection(daemon) as sock:
        sock.sendall(request)
        return read_answer(sock)


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """One answer with a Content-Length; status 0 if none came."""
    text = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            text += part
            head, found, body = text.partition(b"\r\n\r\n")
            lengths = [
                int(line.partition(b":")[2])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            ]
            if found and lengths and len(body) >= lengths[0]:
                break
    return (int(text.split()[1]) if text else 0), text


def counted(daemon: Daemon, name: str) -> int:
    """A counter or gauge of sequences."""
    found = daemon.status()["sequences"]
    return int((found["counters"] | found["gauges"])[name])
