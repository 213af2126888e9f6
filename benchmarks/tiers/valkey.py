"""The Valkey tier against redis-py with hiredis in a bare loop, on one server on loopback.

The bare loop sets and gets objects that are ready as they are: one at a time, or a batch by a
pipeline and by MGET. The tier writes from and reads into the caller's memory, as the daemon does.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import redis

from benchmarks.figures import Figure
from benchmarks.tiers.networked import MIB, Subject, measured, ours
from kvkeep.tiers.valkey import ValkeySettings, ValkeyTier
from tests.servers.valkey import ValkeyServer

ROUND_BYTES = 128 * MIB
ROUNDS = 9


def figures(rounds: int = ROUNDS) -> Iterator[Figure]:
    """Yield megabytes per second of the tier and of the bare client."""
    server = ValkeyServer("--maxmemory", "2gb").run()
    try:
        tier = ValkeyTier(ValkeySettings(url=server.url, timeout_s=30.0))
        client = redis.Redis(host="127.0.0.1", port=server.port)
        with contextlib.closing(tier), contextlib.closing(client):
            yield from measured(
                "tiers.valkey",
                (ours(tier), _bare(client)),
                "redis-py and hiredis in a bare loop",
                round_bytes=ROUND_BYTES,
                rounds=rounds,
            )
    finally:
        server.stop()


def _bare(client: redis.Redis) -> Subject:
    copies: dict[tuple[int, int], bytes] = {}

    def ready(number: int, value: memoryview) -> bytes:
        if (number, len(value)) not in copies:
            copies[number, len(value)] = bytes(value)
        return copies[number, len(value)]

    def write(numbers: Sequence[int], values: Sequence[memoryview]) -> None:
        if len(numbers) == 1:
            client.set(f"bare/{numbers[0]}", ready(numbers[0], values[0]))
            return
        with client.pipeline(transaction=False) as pipeline:
            for number, value in zip(numbers, values, strict=True):
                pipeline.set(f"bare/{number}", ready(number, value))
            pipeline.execute()

    def read(numbers: Sequence[int], rooms: Sequence[memoryview]) -> None:
        names = [f"bare/{number}" for number in numbers]
        found: Any = [client.get(names[0])] if len(names) == 1 else client.mget(names)
        if [len(value) for value in found] != [len(room) for room in rooms]:
            raise RuntimeError("the bare client lost a value")

    return Subject(write, read)
