"""``kvkeep route`` as a process, between real sockets and beside real clients."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.scripted_engine import EVENT, LARGE_BYTES, ScriptedEngine, scripted_engine

TIMEOUT_S = 60.0


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", dict[str, str]]]:
    """A process that says in one JSON line when it is ready; it is stopped at the end."""
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(TIMEOUT_S)


@contextlib.contextmanager
def routed(*urls: str, **settings: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A router in front of engines; yields it when an engine is ready, with its address."""
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    with started("kvkeep", "route", *urls, "--port", "0", *flags) as (process, ready):
        with httpx.Client(timeout=TIMEOUT_S) as client:
            while client.get(f"{ready['url']}/health").status_code != 200:
                assert process.poll() is None
        yield process, ready["url"]


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    """One engine that does as it is told."""
    with scripted_engine() as found:
        yield found


@pytest.fixture(scope="module")
def address(
    engine: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    """A router in front of it; the connections between them end within a test's time."""
    config = tmp_path_factory.mktemp("route") / "route.yaml"
    # Scripts break one response after the other: the engine is to be asked all the same.
    config.write_text("relay: {upstream_idle_s: 0.2}\nhealth: {failures_max: 1000}")
    with routed(engine.url, config=str(config)) as (_, url):
        parts = httpx.URL(url)
        assert parts.port is not None
        yield parts.host, parts.port


@contextlib.contextmanager
def asked(address: tuple[str, int], script: str, body: bytes = b"{}") -> Iterator[socket.socket]:
    """A connection on which a request was sent."""
    with socket.create_connection(address, timeout=TIMEOUT_S) as sock:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nX-Script: {script}\r\n"
            f"X-Odd:  Value \r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sock.sendall(head.encode() + body)
        yield sock


def read_to_end(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    while piece := sock.recv(1 << 16):
        data += piece
    return data


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    """Everything up to a mark."""
    data = b""
    while mark not in data:
        piece = sock.recv(1 << 16)
        assert piece
        data += piece
    return data


class TestBytes:
    def test_a_request_arrives_as_it_was_sent(
        self, engine: ScriptedEngine, address: tuple[str, int]
    ) -> None:
        """Fields in order, case and space; duplicate keys and odd numbers in the body."""
        body = b'{"a": 1, "a": 2, "x": 1.0e5, "text": "\xc3\xa4\\u00e4"}'
        engine.requests.clear()
        with asked(address, "ok", body) as sock:
            got = read_until(sock, body)

        assert engine.requests == [
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nX-Script: ok\r\nX-Odd:  Value \r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        ]
        assert b"X-Kvkeep-Route: " in got

    def test_an_event_is_relayed_before_the_next_exists(
        self, engine: ScriptedEngine, address: tuple[str, int]
    ) -> None:
        """The engine sends its second event only when the client has the first."""
        engine.left.clear()
        with asked(address, "stream") as sock:
            read_until(sock, EVENT)
            engine.left.set()
            rest = read_until(sock, b"0\r\n\r\n")

        assert EVENT in rest

    def test_a_slow_client_stops_the_engine(
        self, engine: ScriptedEngine, address: tuple[str, int]
    ) -> None:
        """The router does not keep what nobody takes; all of it comes in the end."""
        with asked(address, "large") as sock:
            data = read_until(sock, b"\r\n\r\n")
            left = LARGE_BYTES - len(data.partition(b"\r\n\r\n")[2])
            # Buffers of both sockets and the router fill up, and then nothing moves.
            seen = -1
            while seen != engine.sent_bytes:
                seen = engine.sent_bytes
                wait_for_more_than_comes(sock)
            assert seen < LARGE_BYTES
            sock.settimeout(TIMEOUT_S)
            while left:
                left -= len(sock.recv(min(left, 1 << 20)))

        assert left == 0


def wait_for_more_than_comes(sock: socket.socket) -> None:
    """Take nothing, until nothing has come for a while."""
    sock.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        sock.recv(LARGE_BYTES, socket.MSG_PEEK | socket.MSG_WAITALL)


class TestEndings:
    @pytest.mark.parametrize("script", ["never", "endless"])
    def test_a_client_that_leaves_frees_the_engine(
        self, engine: ScriptedEngine, address: tuple[str, int], script: str
    ) -> None:
        """The engine's connection ends, before it answered and in mid-stream."""
        engine.left.clear()
        num_before = len(engine.requests)
        with asked(address, script) as sock:
            if script == "endless":
                read_until(sock, EVENT)
            while len(engine.requests) == num_before:
                pass

        assert engine.left.wait(TIMEOUT_S)

    def test_a_stream_that_breaks_ends_with_an_error(self, address: tuple[str, int]) -> None:
        """The event that came is there, then an error that clients know, then a proper end."""
        with asked(address, "cut") as sock:
            got = read_to_end(sock)

        assert EVENT in got
        assert b'data: {"error": {"message": "the engine broke off' in got
        assert got.endswith(b"0\r\n\r\n")

    def test_a_body_that_breaks_resets_the_connection(self, address: tuple[str, int]) -> None:
        """No client can take the half for the whole."""
        with asked(address, "short") as sock, pytest.raises(ConnectionResetError):
            read_to_end(sock)

    def test_an_early_response_arrives(self, address: tuple[str, int]) -> None:
        """Though the client is still sending, and goes on until it has read."""
        with asked(address, "early", b"x" * (8 << 20)) as sock:
            got = read_until(sock, b"too large")

        assert got.startswith(b"HTTP/1.1 413 ")

    def test_a_refused_request_says_why(self, address: tuple[str, int]) -> None:
        """In JSON, before the connection closes."""
        with socket.create_connection(address, timeout=TIMEOUT_S) as sock:
            sock.sendall(
                b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            )
            head, _, body = read_to_end(sock).partition(b"\r\n\r\n")

        assert head.startswith(b"HTTP/1.1 400 ")
        assert "can't both be given" in json.loads(body)["error"]["message"]


def test_a_running_stream_ends_before_the_router() -> None:
    """After SIGTERM new requests get 503, what runs gets its end, and then the process is gone."""
    with scripted_engine() as engine, routed(engine.url) as (process, url):
        parts = httpx.URL(url)
        assert parts.port is not None
        with asked((parts.host, parts.port), "stream") as sock:
            read_until(sock, EVENT)
            process.send_signal(signal.SIGTERM)
            with httpx.Client(timeout=TIMEOUT_S) as client:
                while client.get(f"{url}/health").status_code == 200:
                    assert process.poll() is None
                late = client.post(f"{url}/v1/completions", json={})
            engine.left.set()
            rest = read_to_end(sock)

        assert late.status_code == 503
        assert late.headers["connection"] == "close"
        assert rest.endswith(EVENT + b"\r\n0\r\n\r\n")
        assert process.wait(TIMEOUT_S) == 0


def test_a_dead_engine_is_routed_around() -> None:
    """Whoever asks meanwhile is answered by the other; both are named."""
    with scripted_engine() as first, scripted_engine() as second:
        with routed(first.url, second.url) as (_, url), httpx.Client(timeout=TIMEOUT_S) as client:
            while "2" not in client.get(f"{url}/health").text:
                pass
            routes = {_route(client, url) for _ in range(4)}
            first.close()
            later = {_route(client, url) for _ in range(6)}

        names = {engine.url.removeprefix("http://") for engine in (first, second)}
        assert routes == names
        assert later == {second.url.removeprefix("http://")}


def _route(client: httpx.Client, url: str) -> str:
    answer = client.post(f"{url}/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-kvkeep-route"].partition(";")[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no engine is named"),
        (["https://a:1"], "not an engine's address"),
        (["http://a:1", "http://a:1"], "twice"),
        (["http://a:1", "--port", "70000"], "port"),
        (["http://a:1", "--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str) -> None:
    """And exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "kvkeep", "route", *arguments],
        capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
    )  # fmt: skip

    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def official_client(base_url: str) -> openai.OpenAI:
    """OpenAI's own client; it keeps no connection, so that none outlives a test."""
    return openai.OpenAI(
        base_url=base_url,
        api_key="none",
        max_retries=0,
        timeout=TIMEOUT_S,
        default_headers={"Connection": "close"},
    )


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """OpenAI's own client, in front of two engines."""
    with (
        started("kvkeep.testing.fake_engine", "--num-engines", "2") as (_, ready),
        routed(*ready["urls"]) as (_, url),
        official_client(f"{url}/v1") as found,
    ):
        yield found


class TestTheOfficialClient:
    def test_models(self, client: openai.OpenAI) -> None:
        """Each model once, however many engines serve it."""
        assert [model.id for model in client.models.list()] == ["fake-model"]

    def test_chat(self, client: openai.OpenAI) -> None:
        """Whole and streamed, the same words come."""
        create: Any = client.chat.completions.create
        asked = {
            "model": "fake-model",
            "messages": [{"role": "user", "content": "Tell me about the sea"}],
            "max_tokens": 8,
        }
        whole = create(**asked)
        text = "".join(
            chunk.choices[0].delta.content or "" for chunk in create(**asked, stream=True)
        )

        assert whole.choices[0].message.content
        assert text == whole.choices[0].message.content

    def test_completions(self, client: openai.OpenAI) -> None:
        """The older interface too."""
        done = client.completions.create(model="fake-model", prompt="Once upon", max_tokens=5)

        assert done.usage is not None
        assert done.usage.completion_tokens == 5

    def test_errors(self, client: openai.OpenAI) -> None:
        """What the engine says of a wrong request is what the client raises."""
        with pytest.raises(openai.NotFoundError, match="no model nobody"):
            client.completions.create(model="nobody", prompt="x")

    def test_what_is_not_there(self, client: openai.OpenAI) -> None:
        """The router's own errors are understood as well."""
        with pytest.raises(openai.NotFoundError, match="ask for a path under /v1/"):
            client.with_options(
                base_url=str(client.base_url).replace("/v1", "")
            ).completions.create(model="fake-model", prompt="x")


KEYS = {
    "busy": {"requests_per_s": 0.01, "burst": 1},
    "wordy": {"prompt_tokens_per_min": 0.01, "prompt_tokens_burst": 1},
}


def test_limits_are_errors_of_the_official_client(tmp_path: Path) -> None:
    """An unknown key is one for good; a rate is one that says when to come back."""
    keys = tmp_path / "keys.json"
    secrets = {name: f"sk-{name}-0123456789" for name in KEYS}
    keys.write_text(
        json.dumps([{"name": name, "key": secrets[name], **KEYS[name]} for name in KEYS])
    )
    keys.chmod(0o600)
    config = tmp_path / "route.yaml"
    config.write_text(json.dumps({"limits": {"keys_file": str(keys)}}))
    with (
        started("kvkeep.testing.fake_engine") as (_, ready),
        routed(*ready["urls"], config=str(config)) as (_, url),
        official_client(f"{url}/v1") as client,
    ):

        def ask(key: str) -> Any:
            create: Any = client.with_options(api_key=key).completions.create
            return create(model="fake-model", prompt="Once upon a time", max_tokens=1)

        with pytest.raises(openai.AuthenticationError, match="No known API key"):
            ask("sk-nobody")
        for name, said in (("busy", "requests each second"), ("wordy", "prompt tokens each")):
            assert ask(secrets[name]).usage.completion_tokens == 1
            with pytest.raises(openai.RateLimitError, match=said) as caught:
                ask(secrets[name])
            assert int(caught.value.response.headers["Retry-After"]) >= 1


def test_tools_and_broken_streams_reach_the_official_client(
    engine: ScriptedEngine, address: tuple[str, int]
) -> None:
    """A tool's schema arrives untouched; an error in mid-stream is not taken for the end."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with official_client(f"http://{address[0]}:{address[1]}/v1") as client:
        create: Any = client.chat.completions.create
        stream = create(
            model="m",
            messages=[{"role": "user", "content": "x"}],
            tools=[tool],
            stream=True,
            extra_headers={"X-Script": "cut"},
            extra_body={"unknown_field": {"kept": True}},
        )
        with pytest.raises(openai.APIError, match="the engine broke off"):
            list(stream)
    sent = json.loads(engine.requests[-1].partition(b"\r\n\r\n")[2])

    assert sent["tools"] == [tool]
    assert sent["unknown_field"] == {"kept": True}
