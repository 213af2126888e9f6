"""A prefill engine, a decode engine and a router between them, in this process."""

import json

import httpx

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.validate.load import Endpoint


class FakePair:
    """Prefills on one engine and decodes on the other, which loads what the first one stored."""

    def __init__(self, faults: Faults | None = None) -> None:
        store = FakeStore()
        self.prefill = FakeEngine(store=store)
        self.decode = FakeEngine(store=store, faults=faults)
        self.hands_over = True

    def answer(self, request: httpx.Request) -> httpx.Response:
        """What the router answers."""
        path, body = request.url.path, request.content
        if request.method == "POST" and "completions" in path:
            asked = json.loads(body)
            if asked.get("echo"):
                return httpx.Response(400, json={"error": {"message": "echo is not served"}})
            if self.hands_over:
                first = {**asked, "max_tokens": 1, "stream": False}
                self.prefill.handle("POST", path, json.dumps(first).encode())
        reply = self.decode.handle(request.method, path, body)
        headers = {"Content-Type": reply.content_type}
        return httpx.Response(reply.status, headers=headers, content=reply.body)

    def router(self) -> Endpoint:
        """Where clients ask."""
        transport = httpx.MockTransport(self.answer)
        endpoint = Endpoint("http://router", transport=transport, model=self.decode.model)
        endpoint.name = "router"
        return endpoint
