"""Fake engines in the test's own process whose streams stop after the first event until told."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from kvkeep.testing.fake_engine import FakeEngine


@dataclass
class Gate:
    """Holds streams back; open at first."""

    opened: asyncio.Event = field(default_factory=asyncio.Event)
    num_held: int = 0

    def __post_init__(self) -> None:
        self.opened.set()


@contextlib.asynccontextmanager
async def gated_engines(count: int, gate: Gate) -> AsyncIterator[list[str]]:
    """Addresses of engines behind one gate."""
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for _ in range(count):
            runner = web.AppRunner(_application(FakeEngine(), gate), shutdown_timeout=1.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
            host, port = runner.addresses[0][:2]
            urls.append(f"http://{host}:{port}")
        yield urls


def _application(engine: FakeEngine, gate: Gate) -> web.Application:
    async def answer(request: web.Request) -> web.StreamResponse:
        reply = engine.handle(request.method, request.path, await request.read())
        headers = {"Content-Type": reply.content_type}
        response = web.StreamResponse(status=reply.status, headers=headers)
        await response.prepare(request)
        for number, (_, piece) in enumerate(reply.pieces):
            await response.write(piece)
            if number == 0 and request.method == "POST":
                gate.num_held += 1
                await gate.opened.wait()
                gate.num_held -= 1
        await response.write_eof()
        return response

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    return application


@dataclass
class Got:
    """What one client got."""

    status: int = 0
    retry_after: str | None = None
    error: dict[str, Any] | None = None
    is_whole: bool = False
    usage: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0
    route: str = ""


async def chat(
    session: aiohttp.ClientSession, url: str, text: str, *, is_stream: bool = True, key: str = ""
) -> Got:
    """Ask for a chat completion, and take all of it."""
    body: dict[str, Any] = {
        "model": "fake-model",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 4,
    }
    if is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
        text = (await answer.read()).decode()
        got = Got(answer.status, answer.headers.get("Retry-After"), num_bytes=len(text))
        got.route = answer.headers.get("X-Kvkeep-Route", "")
        if answer.status != 200:
            got.error = json.loads(text)["error"]
        elif is_stream:
            events = [line[6:] for line in text.split("\n\n") if line]
            got.is_whole = events[-1] == "[DONE]"
            got.usage = json.loads(events[-2])["usage"] if got.is_whole else {}
        else:
            got.usage, got.is_whole = json.loads(text)["usage"], True
    return got
