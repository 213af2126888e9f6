"""Whether a process of a stack is ready, asked from outside and without waiting long.

An engine is ready when its /health says so *and* it has answered a real completion of one token:
vLLM answers /health before the first forward pass has shown that it works.
"""

import json
from typing import Any

import httpx
import msgspec

from kvkeep.model.errors import UnavailableError

PROBE_TIMEOUT_S = 2.0
COMPLETION_TIMEOUT_S = 60.0
"""The first forward pass may compile kernels."""
PROMPT = "Hello"
"""Shorter than a block, so that it is neither stored nor found."""


class Ready(msgspec.Struct, frozen=True):
    """What the daemon says when it listens."""

    socket: str
    metrics_port: int
    pool: str


def find_ready_line(output: bytes) -> Ready | None:
    """The daemon's last announcement in its output; None while there is none."""
    for line in reversed(output.splitlines()):
        if line.startswith(b"{") and b'"ready"' in line:
            try:
                said = json.loads(line)
                if said.get("event") == "ready":
                    return msgspec.convert(said, Ready)
            except (ValueError, AttributeError):
                continue  # not a whole line yet, or somebody else's
    return None


def make_client(url: str) -> httpx.Client:
    """A client for one address: no proxy from the environment, no waiting."""
    # Reading the certificates takes 30 ms of CPU, several times a second while engines start.
    return httpx.Client(trust_env=False, timeout=PROBE_TIMEOUT_S, verify=url.startswith("https:"))


def is_healthy(client: httpx.Client, url: str) -> bool:
    """Whether GET /health answers 200 now."""
    try:
        return client.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def complete_one_token(client: httpx.Client, url: str, model: str | None) -> None:
    """Ask an engine for one token.

    Args:
        client: Made by `make_client`.
        url: Address without a path.
        model: Name to ask for; None takes the first that is served.

    Raises:
        UnavailableError: There was no answer, or none with a token in it.
    """
    try:
        if model is None:
            model = _first_model(client, url)
        request = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        reply = client.post(f"{url}/v1/completions", json=request, timeout=COMPLETION_TIMEOUT_S)
        body: Any = reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise UnavailableError(f"{url} gave no completion: {error!r}") from error
    if reply.status_code != 200:
        raise UnavailableError(f"{url} refused a completion: {json.dumps(body)[:300]}")
    choices = body.get("choices") if isinstance(body, dict) else None
    if not choices or not choices[0].get("finish_reason"):
        raise UnavailableError(f"{url} answered without a token: {json.dumps(body)[:300]}")


def _first_model(client: httpx.Client, url: str) -> str:
    body: Any = client.get(f"{url}/v1/models").json()
    try:
        return str(body["data"][0]["id"])
    except (LookupError, TypeError) as error:
        raise UnavailableError(f"{url} serves no model: {json.dumps(body)[:300]}") from error
