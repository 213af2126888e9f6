"""Says which blocks this daemon keeps, to routers of the same user on the same host.

The form is that of vLLM's block events over ZMQ, with numbers for hashes and no tokens: messages
(topic, sequence number, batch) from a PUB socket, and a ROUTER socket that repeats what was lost.
Where its memory of messages does not reach back far enough it sends one message that says all anew.
Both are Unix sockets that only this user can open.

Runs on the event loop's thread and blocks nowhere: ZMQ drops what a slow router does not take, the
router sees the gap and asks. Bounded: changes between two messages are at most the pool's blocks,
messages kept ``KEPT_MAX``, blocks below the pool ``BELOW_MAX``.
"""

import asyncio
import contextlib
import itertools
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq
import zmq.asyncio

from kvkeep.daemon.local_socket import is_served
from kvkeep.model.announced import POOL_MEDIUM, number_of
from kvkeep.model.clock import Clock
from kvkeep.model.errors import InputError
from kvkeep.model.ids import CANARY_NAMESPACE, BlockKey

REPLAY_SUFFIX: Final = ".replay"
FLUSH_S: Final = 0.02
"""From the first change to the message that tells of it: an engine stores many blocks at once."""
KEPT_MAX: Final = 1024
NUMBER_BYTES: Final = 8
"""Of a sequence number."""
EVENT_BLOCKS: Final = 1 << 14
"""Blocks in one event."""
BELOW_MAX: Final = 1 << 20
"""Blocks followed that are in tiers below the pool alone; 150 bytes each."""
LOOKED_AT: Final = 256
"""Of these looked at in one tick, so that what a tier evicted is noticed in time."""


class Announcer:
    """Told of blocks by the shell, and of time by the daemon's ticks."""

    def __init__(self, path: Path, clock: Clock, is_below: Callable[[BlockKey], bool]) -> None:
        """Open nothing yet.

        Args:
            path: Of the socket for events.
            clock: Stamps messages.
            is_below: Whether a tier below the pool has a block, as far as is known without a call.
        """
        self._path, self._clock, self._is_below = path, clock, is_below
        self._in_pool: dict[int, BlockKey] = {}
        """By slot."""
        self._below: OrderedDict[BlockKey, None] = OrderedDict()
        self._changes: dict[int, bool] = {}
        """By number: whether the block is there now."""
        self._next = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_MAX)
        self._flushing: asyncio.TimerHandle | None = None
        self._events: zmq.Socket[bytes] | None = None
        self._replay: zmq.asyncio.Socket | None = None
        self._serving: asyncio.Task[None] | None = None

    # ---- what the shell tells

    def ready(self, slot: int, key: BlockKey) -> None:
        """A block of the pool became readable."""
        if key.namespace == CANARY_NAMESPACE:
            return
        self._in_pool[slot] = key
        self._below.pop(key, None)
        self._changed(key, is_there=True)

    def freed(self, slot: int) -> None:
        """A slot of the pool is empty."""
        key = self._in_pool.pop(slot, None)
        if key is None:
            return
        if self._is_below(key):
            self._below[key] = None
            if len(self._below) > BELOW_MAX:
                self._changed(self._below.popitem(last=False)[0], is_there=False)
        else:
            self._changed(key, is_there=False)

    def emptied(self) -> None:
        """The pool holds nothing, and what is below it is of another layout."""
        self._in_pool.clear()
        self._below.clear()
        self._changes.clear()
        self._send([_CLEARED])

    def tick(self) -> None:
        """Notice some of what tiers below the pool have evicted."""
        for key in list(itertools.islice(self._below, LOOKED_AT)):
            if self._is_below(key):
                self._below.move_to_end(key)
            else:
                del self._below[key]
                self._changed(key, is_there=False)

    def _changed(self, key: BlockKey, *, is_there: bool) -> None:
        self._changes[number_of(key.block_hash)] = is_there
        if self._flushing is None and self._events is not None:
            self._flushing = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    # ---- what routers hear

    def _flush(self) -> None:
        self._flushing = None
        changes, self._changes = self._changes, {}
        stored = [number for number, is_there in changes.items() if is_there]
        removed = [number for number, is_there in changes.items() if not is_there]
        if changes:
            self._send([*_stored(stored), *_removed(removed)])

    def _send(self, events: list[dict[str, Any]]) -> None:
        if self._events is None:
            return
        payload = self._encode(events)
        self._kept.append((self._next, payload))
        # A PUB socket never waits: what a router does not take in time, it asks for again.
        self._events.send_multipart([b"", _number(self._next), payload])
        self._next += 1

    def _encode(self, events: list[dict[str, Any]]) -> bytes:
        return msgspec.msgpack.encode([self._clock.now_s(), events, 0])

    async def _serve(self) -> None:
        replay = self._replay
        assert replay is not None
        while True:
            frames = await replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != NUMBER_BYTES:
                continue
            client, first = frames[0], int.from_bytes(frames[2], "big")
            for number, payload in self._since(first):
                await replay.send_multipart([client, b"", b"", _number(number), payload])
            await replay.send_multipart([client, b"", b"", b"\xff" * NUMBER_BYTES, b""])

    def _since(self, first: int) -> list[tuple[int, bytes]]:
        """Return the messages from a number on; where they are not kept, one that says all."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flush()
        if self._kept and self._kept[0][0] <= first:
            return [(number, payload) for number, payload in self._kept if number >= first]
        keys = itertools.chain(self._in_pool.values(), self._below)
        numbers = [number_of(key.block_hash) for key in keys]
        return [(max(0, self._next - 1), self._encode([_CLEARED, *_stored(numbers)]))]

    # ---- life

    def open(self) -> None:
        """Take the sockets; a loop is running.

        Raises:
            InputError: They can't be had.
        """
        for path in self._paths:
            if path.is_symlink() or (path.exists() and not path.is_socket()):
                raise InputError(f"{path} exists and is not a socket: choose another events_socket")
            # ZMQ would take the path away from whoever listens there.
            if is_served(path):
                raise InputError(f"somebody listens on {path}: choose another events_socket")
        context = zmq.Context()
        # Only this user may connect.
        before = os.umask(0o177)
        try:
            self._events = context.socket(zmq.PUB)
            self._events.bind(f"ipc://{self._paths[0]}")
            self._replay = zmq.asyncio.Context(context).socket(zmq.ROUTER)
            self._replay.bind(f"ipc://{self._paths[1]}")
        except zmq.ZMQError as error:
            context.destroy(linger=0)
            raise InputError(
                f"the socket {self._path} can't be had ({error}): choose another events_socket"
            ) from error
        finally:
            os.umask(before)
        self._context = context
        self._serving = asyncio.get_running_loop().create_task(self._serve())
        self._send([_CLEARED])
        for key in self._in_pool.values():
            self._changed(key, is_there=True)

    @property
    def _paths(self) -> tuple[Path, Path]:
        return self._path, self._path.with_name(self._path.name + REPLAY_SUFFIX)

    async def close(self) -> None:
        """End; routers notice."""
        if self._flushing is not None:
            self._flushing.cancel()
        if self._serving is None:
            return
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        for opened in (self._events, self._replay):
            if opened is not None:
                opened.close(linger=0)
        self._events = self._replay = None
        self._context.destroy(linger=0)
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.unlink()


_CLEARED: Final = {"type": "AllBlocksCleared"}


def _stored(numbers: list[int]) -> Iterable[dict[str, Any]]:
    for piece in _pieces(numbers):
        # What readers of vLLM's events need to find, though there are no tokens.
        yield {
            "type": "BlockStored",
            "block_hashes": piece,
            "parent_block_hash": None,
            "token_ids": [],
            "block_size": 1,
            "lora_id": None,
            "medium": POOL_MEDIUM,
        }


def _removed(numbers: list[int]) -> Iterable[dict[str, Any]]:
    for piece in _pieces(numbers):
        yield {"type": "BlockRemoved", "block_hashes": piece, "medium": POOL_MEDIUM}


def _pieces(numbers: list[int]) -> Iterable[list[int]]:
    for start in range(0, len(numbers), EVENT_BLOCKS):
        yield numbers[start : start + EVENT_BLOCKS]


def _number(number: int) -> bytes:
    return number.to_bytes(NUMBER_BYTES, "big")
