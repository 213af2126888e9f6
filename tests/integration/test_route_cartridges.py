"""Requests that name cartridges, through a router that is a process of its own."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from kvkeep.cartridges.registry import Registry
from tests.integration.routers import Announced, engines, router, wait_for, workers
from tests.unit.cartridges.made import contents, draft
from tests.waiting import HANG_S


class Pages(http.server.ThreadingHTTPServer):
    """Says of each engine, by its port, what its host has in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Page)
        self.resident: dict[str, list[str]] = {}

    @property
    def template(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{{port}}"


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Pages)
        names = self.server.resident.get(self.path.strip("/"))
        self.send_response(404 if names is None else 200)
        self.end_headers()
        if names is not None:
            told = [{"cartridge_id": name, "state": "loaded"} for name in names]
            self.wfile.write(json.dumps({"cartridges": told}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""


@contextlib.contextmanager
def serving(pages: Pages) -> Iterator[None]:
    thread = threading.Thread(target=pages.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        pages.shutdown()
        thread.join()
        pages.server_close()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Announced, Pages, Path]]:
    """Two engines behind a router whose registry is empty at first."""
    folder, pages = tmp_path_factory.mktemp("library"), Pages()
    with serving(pages), engines(2) as urls:
        for url, names in zip(urls, (["whales"], ["ships"]), strict=True):
            pages.resident[url.rpartition(":")[2]] = names
        section = {"library": str(folder), "resident_at": pages.template, "refresh_s": 0.05}
        with router(urls, {"cartridges": section}) as process:
            wait_for(
                process,
                lambda told: (
                    sorted(map(str, told["cartridges"]["resident"].values()))
                    == ["['ships']", "['whales']"]
                ),
            )
            yield process, pages, folder


def ask(process: Announced, cartridge_id: str) -> Any:
    """As a user of OpenAI's client asks; the whole response."""
    with openai.OpenAI(
        base_url=f"{process.ready['url']}/v1",
        api_key="none",
        max_retries=0,
        timeout=HANG_S,
    ) as client:
        return client.completions.with_raw_response.create(
            model="fake-model",
            prompt="a b c",
            extra_body={"kv_transfer_params": {"cartridge_id": cartridge_id}},
        )


def register(process: Announced, folder: Path, cartridge_id: str) -> dict[str, Any]:
    """Register one that is new, and wait until the router knows it; what it tells then."""
    num_before = workers(process)["cartridges"]["known"]
    with Registry(folder) as registry:
        registry.register_contents(draft(cartridge_id), contents())
    return wait_for(process, lambda told: told["cartridges"]["known"] == num_before + 1)


def test_a_cartridge_is_known_once_it_is_registered(
    fleet: tuple[Announced, Pages, Path],
) -> None:
    """Before that a clear 404; afterwards its requests go where it is resident."""
    process, _, folder = fleet
    with pytest.raises(openai.NotFoundError, match="there is no cartridge 'ships'"):
        ask(process, "ships")
    told = register(process, folder, "ships")
    holder = next(
        name for name, names in told["cartridges"]["resident"].items() if names == ["ships"]
    )

    for _ in range(3):
        line = ask(process, "ships").headers["x-kvkeep-route"]
        assert line.startswith(f"{holder}; round_robin; ")
        assert line.endswith(", cartridge resident; cartridge=ships by cartridge_id")


def test_operators_see_what_was_found(fleet: tuple[Announced, Pages, Path]) -> None:
    """The explanation names the cartridge, and counters and gauges are Prometheus's."""
    process, _, folder = fleet
    num_known = register(process, folder, "whales")["cartridges"]["known"]
    ask(process, "whales")
    admin = process.ready["admin_url"]
    body = {"prompt": "a", "kv_transfer_params": {"cartridge_id": "whales"}}
    explained = httpx.post(
        f"{admin}/explain?path=/v1/completions", json=body, trust_env=False, timeout=HANG_S
    )
    refused = httpx.post(
        f"{admin}/explain?path=/v1/completions",
        json={"kv_transfer_params": {"cartridge_id": "bees"}},
        trust_env=False,
        timeout=HANG_S,
    )
    metrics = httpx.get(f"{admin}/metrics", trust_env=False, timeout=HANG_S).text

    assert explained.json()["cartridge"] == "whales"
    assert "cartridge resident" in explained.json()["reason"]
    assert (refused.status_code, "bees" in refused.text) == (404, True)
    assert 'kvkeep_router_cartridge_requests_total{found="chosen"}' in metrics
    assert f"kvkeep_router_cartridges_known {num_known}.0" in metrics
