"""The routers that are compared, as processes, and the processor time they used."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import ROOT, python_of
from benchmarks.router.load import Seen, Shape

START_S = 60.0
PEER = "vllm-router 0.1.17"
RAW = "a relay that understands nothing"
"""Two sockets and nothing between them: what no relay on this event loop gets below."""


@dataclass(frozen=True)
class Subject:
    """One router that runs."""

    name: str
    port: int
    pids: tuple[int, ...]


@contextlib.contextmanager
def upstreams(count: int) -> Iterator[list[str]]:
    """Canned engines, each a process; yields their addresses."""
    with contextlib.ExitStack() as stack:
        urls = []
        for _ in range(count):
            process = stack.enter_context(
                _process([sys.executable, "-m", "benchmarks.router.upstream"])
            )
            assert process.stdout is not None
            urls.append(f"http://127.0.0.1:{int(process.stdout.readline())}")
        yield urls


@contextlib.contextmanager
def kvkeep(urls: Sequence[str], policy: str) -> Iterator[Subject]:
    """The router of this project."""
    command = [sys.executable, "-m", "kvkeep", "route", *urls, "--port", "0", "--policy", policy]
    with _process([*command, "--log-level", "WARNING"]) as process:
        assert process.stdout is not None
        port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
        _await_ready(port, process)
        yield Subject("kvkeep", port, (process.pid,))


@contextlib.contextmanager
def vllm_router(urls: Sequence[str], policy: str) -> Iterator[Subject]:
    """The router of the vLLM project, in Rust."""
    binary = python_of("vllm-router").parent / "vllm-router"
    port, metrics_port = _free_ports(2)
    command = [str(binary), "--host", "127.0.0.1", "--port", str(port), "--policy", policy]
    command += ["--worker-urls", *urls, "--prometheus-port", str(metrics_port)]
    command += ["--worker-startup-check-interval", "1", "--log-level", "error"]
    with _process(command) as process:
        _await_ready(port, process)
        yield Subject(PEER, port, (process.pid,))


@contextlib.contextmanager
def raw_relay(urls: Sequence[str], policy: str) -> Iterator[Subject]:
    """Bytes from one socket to another, unread; each connection has an engine for its life."""
    ports = [url.rpartition(":")[2] for url in urls]
    command = [sys.executable, "-m", "benchmarks.router.raw_relay", *ports]
    with _process(command) as process:
        assert process.stdout is not None
        yield Subject(RAW, int(process.stdout.readline()), (process.pid,))


@dataclass(frozen=True)
class Used:
    """Processor time of a router."""

    seconds: float
    kernel_share: float
    """Of the ticks that fell on it, those in the kernel; 0 without any."""


def measure(subject: Subject, shape: Shape) -> tuple[Seen, Used]:
    """Run a load; returns what came back, and the processor time the router used meanwhile."""
    asked = json.dumps({**shape.__dict__, "port": subject.port})
    with _process([sys.executable, "-m", "benchmarks.router.load", asked]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        before_s, (user, kernel) = _cpu_s(subject.pids), _ticks(subject.pids)
        assert process.stdout.readline() == "end\n"
        used_s, (user_after, kernel_after) = _cpu_s(subject.pids) - before_s, _ticks(subject.pids)
        num_ticks = user_after - user + kernel_after - kernel
        used = Used(used_s, (kernel_after - kernel) / num_ticks if num_ticks else 0.0)
        return Seen(**json.loads(process.stdout.readline())), used


def _cpu_s(pids: Sequence[int]) -> float:
    """User and system time of all threads, from the scheduler's nanoseconds."""
    total_ns = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that just ended
                total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def _ticks(pids: Sequence[int]) -> tuple[int, int]:
    """In user mode and in the kernel, of all threads."""
    user = kernel = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user, kernel = user + int(fields[11]), kernel + int(fields[12])
    return user, kernel


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
        env=dict(os.environ),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _await_ready(port: int, process: "subprocess.Popen[str]") -> None:
    """Wait until a request is answered by an engine."""
    end_s = time.perf_counter() + START_S
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", b'{"model": "canned", "prompt": "x"}',
        {"Content-Type": "application/json"},
    )  # fmt: skip
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=5) as answer:
                answer.read()
                return
        except OSError as error:
            if time.perf_counter() > end_s or process.poll() is not None:
                raise RuntimeError(f"{process.args!r} does not serve") from error
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
