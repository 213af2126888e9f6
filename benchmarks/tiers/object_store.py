"""The object store tier against obstore in a bare loop, on one SeaweedFS on loopback.

The bare loop puts and gets objects that are ready as they are: one at a time, or a batch by as
many threads as the tier has. The tier writes from and reads into the caller's memory, as the daemon
does.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from obstore.store import S3Store

from benchmarks.figures import Figure
from benchmarks.tiers.networked import MIB, Subject, measured, ours
from kvkeep.tiers.object_store import ObjectStoreTier
from tests.servers.seaweed import SeaweedServer

ROUND_BYTES = 32 * MIB
ROUNDS = 15
VOLUME_MIB = 1024


def figures(rounds: int = ROUNDS) -> Iterator[Figure]:
    """Yield megabytes per second of the tier and of the bare client."""
    server = SeaweedServer(VOLUME_MIB).run()
    try:
        settings = server.settings(timeout_s=60.0)
        tier = ObjectStoreTier(settings)
        threads = ThreadPoolExecutor(settings.num_threads)
        with contextlib.closing(tier), threads:
            yield from measured(
                "tiers.object_store",
                (ours(tier), _bare(server.store(), threads)),
                "obstore in a bare loop",
                round_bytes=ROUND_BYTES,
                rounds=rounds,
            )
    finally:
        server.stop()


def _bare(store: S3Store, threads: ThreadPoolExecutor) -> Subject:
    copies: dict[tuple[int, int], bytes] = {}

    def put(number: int, value: memoryview) -> None:
        if (number, len(value)) not in copies:
            copies[number, len(value)] = bytes(value)
        store.put(f"bare/{number}", copies[number, len(value)], use_multipart=False)

    def get(number: int, room: memoryview) -> None:
        if len(store.get(f"bare/{number}").bytes()) != len(room):
            raise RuntimeError("the bare client lost a value")

    def write(numbers: Sequence[int], values: Sequence[memoryview]) -> None:
        if len(numbers) == 1:
            put(numbers[0], values[0])
        else:
            list(threads.map(put, numbers, values))

    def read(numbers: Sequence[int], rooms: Sequence[memoryview]) -> None:
        if len(numbers) == 1:
            get(numbers[0], rooms[0])
        else:
            list(threads.map(get, numbers, rooms))

    return Subject(write, read)
