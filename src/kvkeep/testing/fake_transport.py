"""Connects httpx to a fake engine in the same process, without a socket."""

import httpx

from kvkeep.testing.fake_engine import FakeEngine


def fake_transport(engine: FakeEngine) -> httpx.MockTransport:
    """A transport whose every request is answered by ``engine.handle`` at once."""

    def answer(request: httpx.Request) -> httpx.Response:
        reply = engine.handle(request.method, request.url.path, request.content)
        return httpx.Response(
            reply.status, headers={"Content-Type": reply.content_type}, content=reply.body
        )

    return httpx.MockTransport(answer)
