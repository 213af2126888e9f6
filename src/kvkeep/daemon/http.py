"""Health, status and metrics over HTTP on the loopback address."""

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from kvkeep.daemon.metrics import Metrics

HOST = "127.0.0.1"


def make_application(metrics: Metrics) -> web.Application:
    """The three pages; all of them only ask."""
    registry = CollectorRegistry()
    registry.register(metrics)

    async def health(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def status(_request: web.Request) -> web.Response:
        return web.json_response(metrics.status())

    async def prometheus(_request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    application = web.Application()
    application.router.add_get("/health", health)
    application.router.add_get("/status", status)
    application.router.add_get("/metrics", prometheus)
    return application
