"""The transport: httpx talks to a fake engine without a socket."""

import httpx

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_transport import fake_transport


async def test_requests_reach_the_engine() -> None:
    """Status, type and body are the engine's."""
    async with httpx.AsyncClient(
        transport=fake_transport(FakeEngine(model="m")), base_url="http://fake"
    ) as client:
        models = await client.get("/v1/models?x=1")
        missing = await client.get("/nothing")

    assert models.json()["data"][0]["id"] == "m"
    assert models.headers["content-type"] == "application/json"
    assert missing.status_code == 404
