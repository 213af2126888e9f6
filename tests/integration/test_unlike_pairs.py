"""Engines that could not read each other's blocks: no router is started for them."""

import contextlib
import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.routers import ROUTE, Announced, environment
from tests.servers.processes import free_port

TIMEOUT_S = 120.0


@contextlib.contextmanager
def telling(block_tokens: int) -> Iterator[str]:
    """A server that tells what vLLM does of its cache, and gives a token; its address."""
    labels = f'block_size="{block_tokens}",cache_dtype="auto",engine="0"'
    pages = {
        "/metrics": f"vllm:cache_config_info{{{labels}}} 1.0\n",
        "/v1/models": json.dumps({"data": [{"id": "m"}]}),
        "/v1/completions": json.dumps({"choices": [{"text": "x", "finish_reason": "length"}]}),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path, "").encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def pair() -> Iterator[tuple[str, str]]:
    """A prefill engine and a decode engine whose blocks differ in size."""
    with telling(32) as prefill, telling(64) as decode:
        yield prefill, decode


def refused(*command: str) -> str:
    """What a command says that is wrong; it ends with 2 and one line."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(), check=False
    )
    assert done.returncode == 2, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_route_names_engines_with_blocks_of_unlike_size(pair: tuple[str, str]) -> None:
    """One sentence with both addresses and the mend; nothing listens."""
    prefill, decode = pair
    said = refused(*ROUTE, "--prefill", prefill, "--decode", decode, "--port", "0")

    assert f"the engine at {decode} runs with --block-size 64" in said
    assert f"the engine at {prefill} with 32" in said
    assert said.endswith("start both with the same, or leave one out.")


def test_up_names_engines_with_blocks_of_unlike_size(pair: tuple[str, str], tmp_path: Path) -> None:
    """A stack of engines that run already is not put behind a router either."""
    engines = [
        {"name": name, "url": url, "role": role}
        for name, url, role in zip("pd", pair, ("prefill", "decode"), strict=True)
    ]
    values = {
        "state_dir": str(tmp_path / "state"),
        "daemon": {"enabled": False},
        "router": {},
        "engines": engines,
    }
    file = tmp_path / "stack.yaml"
    file.write_text(json.dumps(values))

    said = refused(*ROUTE[:-1], "up", str(file), "--quiet")

    assert f"engine d at {pair[1]} runs with --block-size 64 and engine p at {pair[0]}" in said


def test_engines_that_are_not_there_yet_are_waited_for() -> None:
    """The router starts without them: it asks again, and hands nothing over meanwhile."""
    nobody = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    router = Announced([*ROUTE, "--prefill", nobody[0], "--decode", nobody[1], "--port", "0"])
    try:
        assert router.ready["event"] == "ready"
    finally:
        assert router.stop() == 0


def test_engines_with_equal_blocks_are_taken() -> None:
    """The same question lets those through that fit."""
    with telling(32) as prefill, telling(32) as decode:
        router = Announced([*ROUTE, "--prefill", prefill, "--decode", decode, "--port", "0"])
        try:
            assert router.ready["event"] == "ready"
        finally:
            assert router.stop() == 0
