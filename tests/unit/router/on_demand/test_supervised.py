"""The router's side of the supervisor's socket, against a supervisor that a test plays."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvkeep.router.on_demand import supervised
from kvkeep.router.on_demand.starter import StartNews
from kvkeep.router.on_demand.supervised import SupervisedStarter

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Supervisor:
    """Accepts connections, and leaves them to the test."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[Streams] = asyncio.Queue()
        self.news: asyncio.Queue[StartNews] = asyncio.Queue()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.connections.put((reader, writer))


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[tuple[Supervisor, SupervisedStarter]]:
    supervisor, starter = Supervisor(), SupervisedStarter(str(path))
    server = await asyncio.start_unix_server(supervisor.accept, path)
    running = asyncio.create_task(starter.run(supervisor.news.put_nowait))
    try:
        yield supervisor, starter
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        server.close()
        while not supervisor.connections.empty():
            supervisor.connections.get_nowait()[1].close()


@pytest.fixture(autouse=True)
def _again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "AGAIN_S", 0.0)


async def test_news_come_and_orders_go(tmp_path: Path) -> None:
    """A line each, in both directions."""
    async with connected(tmp_path / "s") as (supervisor, starter):
        reader, writer = await supervisor.connections.get()
        writer.write(b'{"engine":"a","state":"starting","text":"loading"}\n')
        news = await supervisor.news.get()
        starter.start("a")
        starter.stop("a")
        orders = [await reader.readline() for _ in range(2)]
        writer.close()

    assert news == StartNews("a", "starting", "loading")
    assert orders == [
        b'{"engine":"a","is_wanted":true}\n',
        b'{"engine":"a","is_wanted":false}\n',
    ]


@pytest.mark.parametrize("said", [b"", b"nonsense\n", b'{"engine":"a","state":"odd"}\n'])
async def test_a_connection_that_is_lost_is_made_again(tmp_path: Path, said: bytes) -> None:
    """Closed, or of no use: the next one begins with what is."""
    async with connected(tmp_path / "s") as (supervisor, _):
        _, writer = await supervisor.connections.get()
        writer.write(said)
        writer.close()
        _, again = await supervisor.connections.get()
        again.write(b'{"engine":"a","state":"ready"}\n')
        news = await supervisor.news.get()
        again.close()

    assert news.state == "ready"


async def test_without_a_supervisor_orders_are_dropped(tmp_path: Path) -> None:
    """Nothing fails and nothing is queued up: the news of the next connection show what is."""
    starter = SupervisedStarter(str(tmp_path / "nobody"))
    starter.start("a")
    running = asyncio.create_task(starter.run(lambda _: None))
    for _ in range(5):
        await asyncio.sleep(0)
    starter.start("a")
    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
