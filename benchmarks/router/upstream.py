"""An engine that costs next to nothing: canned responses, as fast as an event loop gives them.

``POST /v1/completions`` answers a short JSON body; with the header ``X-Events`` it streams as many
events as that says, one each ``X-Pause-Ms``, each in a chunk and a write of its own, as vLLM does.
Every GET is answered with 200, for whoever asks how the engine is.

Run as a program: prints its port and serves until it is ended.
"""

import asyncio
import json
from typing import cast

import uvloop

BODY = json.dumps(
    {
        "id": "cmpl-0",
        "object": "text_completion",
        "model": "canned",
        "choices": [{"index": 0, "text": " word" * 40, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 400, "completion_tokens": 40, "total_tokens": 440},
    }
).encode()
MODELS = b'{"object": "list", "data": [{"id": "canned", "object": "model"}]}'
EVENT = (
    b"data: "
    + json.dumps(
        {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 1700000000,
            "model": "canned",
            "choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}],
        }
    ).encode()
    + b"\n\n"
)
EVENT_CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
COMMON = b"date: Sat, 21 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n"


def whole(body: bytes) -> bytes:
    """A response of one piece."""
    head = b"HTTP/1.1 200 OK\r\n" + COMMON + b"content-length: %d\r\n" % len(body)
    return head + b"content-type: application/json\r\n\r\n" + body


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\n" + COMMON + b"content-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
WHOLE, MODELS_WHOLE = whole(BODY), whole(MODELS)


class Canned(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._data = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody connected."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody listens any more."""
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer each request once it is whole."""
        self._data += data
        while (end := self._data.find(b"\r\n\r\n") + 4) != 3:
            head = self._data[:end].lower()
            after = end + _number(head, b"\r\ncontent-length:")
            if len(self._data) < after:
                return
            self._data = self._data[after:]
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        num_events = _number(head, b"\r\nx-events:")
        if num_events:
            self._transport.write(STREAM_HEAD)
            self._stream(num_events, _number(head, b"\r\nx-pause-ms:") / 1000)
        elif head.startswith(b"get"):
            self._transport.write(MODELS_WHOLE)
        else:
            self._transport.write(WHOLE)

    def _stream(self, left: int, pause_s: float) -> None:
        self._transport.write(EVENT_CHUNK if left else LAST)
        if left:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(pause_s, self._stream, left - 1, pause_s)


def _number(head: bytes, mark: bytes) -> int:
    at = head.find(mark)
    return 0 if at < 0 else int(head[at + len(mark) : head.index(b"\r\n", at + 2)])


async def serve() -> None:
    """Serve on a free port of 127.0.0.1 until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
