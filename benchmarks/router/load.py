"""Load of a given shape on one address: requests back to back, at a rate, or as streams of events.

Run as a program with one JSON argument, a `Shape`; prints one JSON line, a `Seen`.
"""

import asyncio
import dataclasses
import json
import random
import sys
import time
from typing import cast

import uvloop

BODY_BYTES = 2048
BODIES = 64
"""Different requests: no two that follow each other are alike, in length neither."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is sent."""

    port: int
    num_connections: int
    seconds: float
    rate_per_s: float = 0.0
    """Requests each second over all connections, at random moments; 0: back to back."""
    num_events: int = 0
    """Events of each response; 0: no stream."""
    pause_ms: int = 0
    """Between two events."""
    session_header: bool = False
    """Whether each request names one of a thousand sessions."""


@dataclasses.dataclass
class Seen:
    """What came back, without the warm-up."""

    num_requests: int
    num_events: int
    num_errors: int
    seconds: float
    p50_ms: float
    p99_ms: float


def make_requests(shape: Shape) -> list[bytes]:
    """Requests as the OpenAI client sends them: its headers, and a body of about 2 KiB."""
    chance = random.Random(1)
    made = []
    for number in range(BODIES):
        prompt = "".join(chance.choices("abcdefgh ", k=BODY_BYTES - 120 + chance.randrange(60)))
        fields = {"model": "canned", "prompt": prompt, "max_tokens": 40, "temperature": 0}
        body = json.dumps(fields | ({"stream": True} if shape.num_events else {})).encode()
        extra = (
            f"X-Session-Id: session-{chance.randrange(1000)}\r\n" if shape.session_header else ""
        )
        if shape.num_events:
            extra += f"X-Events: {shape.num_events}\r\nX-Pause-Ms: {shape.pause_ms}\r\n"
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept-Encoding: gzip, deflate\r\n"
            f"Connection: keep-alive\r\nAccept: application/json\r\nX-Request-Number: {number}\r\n"
            "Content-Type: application/json\r\nUser-Agent: OpenAI/Python 3.52.0\r\n"
            f"Authorization: Bearer EMPTY\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


class Client(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._data = b""
        self._left = -1
        """Bytes of a body that have not come; -1 while the head has not."""
        self._is_stream = False
        self._due_s = 0.0
        self.is_busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The router took the connection."""
        self._transport = cast(asyncio.Transport, transport)
        self._load.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The router, or this end, closed it."""
        if self.is_busy:
            self._load.num_errors += 1

    def send(self, request: bytes, due_s: float) -> None:
        """Send a request that was due at some moment."""
        self._due_s, self.is_busy, self._left, self._data = due_s, True, -1, b""
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Count what came, and see whether it is the end."""
        if self._left < 0:
            data = self._data + data
            end = data.find(b"\r\n\r\n") + 4
            if end == 3:
                self._data = data
                return
            head, data = data[:end].lower(), data[end:]
            if not head.startswith(b"http/1.1 200"):
                self._load.num_errors += 1
            at = head.find(b"\r\ncontent-length:")
            self._is_stream = at < 0
            self._left = 0 if at < 0 else int(head[at + 17 : head.index(b"\r\n", at + 2)])
        if self._is_stream:
            self._load.num_events += data.count(b"data: ")
            self._data = (self._data + data)[-7:]
            is_over = self._data == b"\r\n0\r\n\r\n"
        else:
            self._left -= len(data)
            is_over = self._left == 0
        if is_over:
            self.is_busy = False
            self._load.ended(self, time.perf_counter() - self._due_s)


class Load:
    """All connections and what they measure."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._requests = make_requests(shape)
        self._num_sent = 0
        self._is_over = False
        self._late: list[float] = []
        """When requests were due for which no connection was free."""
        self._latencies_s: list[float] = []
        self.idle: list[Client] = []
        self.num_events = self.num_errors = 0

    def _next(self) -> bytes:
        self._num_sent += 1
        return self._requests[self._num_sent % BODIES]

    def ended(self, client: Client, latency_s: float) -> None:
        """A response is over; the connection is free."""
        self._latencies_s.append(latency_s)
        if self._is_over:
            return
        if not self._shape.rate_per_s:
            client.send(self._next(), time.perf_counter())
        elif self._late:
            client.send(self._next(), self._late.pop(0))
        else:
            self.idle.append(client)

    async def _arrive(self) -> None:
        """Send at random moments, whether or not responses come."""
        chance, due_s = random.Random(2), time.perf_counter()
        while not self._is_over:
            due_s += chance.expovariate(self._shape.rate_per_s)
            wait_s = due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if self.idle:
                self.idle.pop().send(self._next(), due_s)
            else:
                self._late.append(due_s)

    async def run(self) -> Seen:
        """Warm up for a quarter of the time, then measure."""
        shape, loop = self._shape, asyncio.get_running_loop()
        for _ in range(shape.num_connections):
            await loop.create_connection(lambda: Client(self), "127.0.0.1", shape.port)
        if shape.rate_per_s:
            arriving = loop.create_task(self._arrive())
        else:
            for client in self.idle:
                client.send(self._next(), time.perf_counter())
        await asyncio.sleep(shape.seconds / 4)
        print("begin", flush=True)
        self._latencies_s.clear()
        self.num_events, begun_s = 0, time.perf_counter()
        await asyncio.sleep(shape.seconds)
        seconds = time.perf_counter() - begun_s
        latencies, num_events, self._is_over = sorted(self._latencies_s), self.num_events, True
        print("end", flush=True)
        if shape.rate_per_s:
            await arriving
        return Seen(
            len(latencies),
            num_events,
            self.num_errors,
            seconds,
            1e3 * latencies[len(latencies) // 2] if latencies else 0.0,
            1e3 * latencies[int(len(latencies) * 0.99)] if latencies else 0.0,
        )


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(uvloop.run(Load(Shape(**json.loads(sys.argv[1]))).run()))))
