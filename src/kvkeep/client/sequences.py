"""Named sequences' K/V at the daemons that own them.

Each sequence belongs to one daemon, found on the ring by its name and the daemons' names alone: so
every client, before and after any restart, asks the same one, and no other. A daemon that is away
is not replaced by another, which would split the sequence: the call says so instead.

Blocking, and safe to use from several threads. A call takes no longer than its deadline.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

from kvkeep.client.sequence_calls import Peer, Reply, refusal_of
from kvkeep.client.sequence_tensors import Tensor, as_tensor
from kvkeep.core.ring import Ring, spot_of
from kvkeep.model.clock import Clock, SystemClock
from kvkeep.model.errors import CorruptDataError, InputError
from kvkeep.protocol import tensors
from kvkeep.protocol.sequence_body import KEY, VALUE, check_name, pair_layers, tensor_name

KNOWN_MAX = 1 << 16
"""Sequences of which a client remembers that it wrote them."""

Layers = Mapping[int, tuple[object, object]]
"""Keys and values by layer, each ``[tokens, heads, dim]``."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sequence."""

    length: int
    """Tokens that every layer has."""
    layers: Mapping[int, int]
    """Tokens of each layer."""


@dataclass
class Locality:
    """How often a client looked for sequences at a daemon, and found them there."""

    num_asked: int = 0
    """Requests of any kind."""
    num_reads: int = 0
    """Of those, how many asked for a sequence or its length."""
    num_found: int = 0
    """Of those, how many found it."""

    @property
    def share(self) -> float:
        """Reads that found their sequence where the ring says that it is; 1 before the first."""
        return self.num_found / self.num_reads if self.num_reads else 1.0


class SequenceClient:
    """Puts, appends to, gets and deletes sequences, each at its owner."""

    def __init__(
        self,
        daemons: Mapping[str, str] | Sequence[str],
        *,
        key: str = "",
        deadline_s: float = 30.0,
        answer_bytes_max: int = 1 << 30,
        clock: Clock | None = None,
    ) -> None:
        """Know the daemons; none is asked yet.

        Args:
            daemons: URLs of their listeners by name, in any order; without names ``HOST:PORT`` is
                one. The same names for every client: they decide who owns what.
            key: What the listeners ask for.
            deadline_s: How long any call may take, in seconds.
            answer_bytes_max: The longest answer that is taken.
            clock: For tests.

        Raises:
            InputError: There is no daemon, two of one name, or an address is none.
        """
        urls = _by_name(daemons)
        self._clock = clock or SystemClock()
        self._deadline_s = deadline_s
        self._answer_bytes_max = answer_bytes_max
        self._peers = {name: Peer(url, key, self._clock) for name, url in urls.items()}
        self._ring: Ring[str] = Ring((name, 1.0, name) for name in urls)
        self._lock = threading.Lock()
        self._written: OrderedDict[str, None] = OrderedDict()
        self.locality = {name: Locality() for name in urls}
        """By daemon."""

    def __enter__(self) -> "SequenceClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close idle connections; the client can still be used."""
        for peer in self._peers.values():
            peer.close()

    def owner(self, name: str) -> str:
        """The daemon that a sequence belongs to, by its name."""
        check_name(name)
        return self._ring.home(spot_of(name.encode()))

    def put(self, name: str, layers: Layers) -> Lengths:
        """Let a sequence be these layers and no others.

        Raises:
            InputError: The arrays are none that can be kept; nothing was changed.
            CorruptDataError: The bytes were changed on the way; nothing was changed there.
            CapacityError: They are too many, or too much is on its way; nothing was changed.
            UnavailableError: The owner did not answer. It was put whole, or nothing was changed.
        """
        return self._write("PUT", name, layers)

    def put_layers(self, name: str, layers: Layers) -> Lengths:
        """Let these layers of a sequence be so; its others stay. Raises what ``put`` raises.

        Raises:
            RefusedError: The sequence was evicted: its other layers are gone.
        """
        return self._write("PATCH", name, layers)

    def append(self, name: str, layers: Layers, *, expected_length: int | None = None) -> Lengths:
        """Put tokens behind a sequence's: behind those of each of these layers, or of none.

        A sequence that is not there begins with them, unless this client wrote it before: then it
        was lost or deleted meanwhile, and what would be read is not the whole of it.

        Args:
            name: Of the sequence.
            layers: The tokens.
            expected_length: Tokens that each of these layers must have before; 0: none. With it
                an append can be repeated safely, and two at once can't both land.

        Raises:
            RefusedError: The length is another, the arrays are of another kind, or the sequence
                is not there any more; nothing was changed.
            InputError, CapacityError, UnavailableError: As for ``put``.
        """
        query = {} if expected_length is None else {"expected_length": str(expected_length)}
        if expected_length is None and self._has_written(name):
            query["create"] = "false"
        return self._write("POST", name, layers, query)

    def get(
        self, name: str, layers: Iterable[int] | None = None
    ) -> dict[int, tuple[Tensor, Tensor]] | None:
        """A sequence's keys and values by layer, as they were at one time; None if not there.

        Args:
            name: Of the sequence.
            layers: Only these; None too if one of them is not there.

        Raises:
            CorruptDataError: What came is no sequence, or not what was sent; ask again.
            CapacityError: Too much is on its way; ask again later.
            UnavailableError: The owner did not answer.
        """
        query = {}
        if layers is not None:
            query["layers"] = ",".join(map(str, sorted(set(layers))))
        reply = self._read(name, "", query)
        if reply is None:
            return None
        reply.check()
        return _parse_layers(reply.body)

    def lengths(self, name: str) -> Lengths | None:
        """Tokens of a sequence, by layer; None if it is not there. Raises what ``get`` raises."""
        reply = self._read(name, "/length", {})
        return None if reply is None else _parse_lengths(reply)

    def length(self, name: str) -> int:
        """Tokens that every layer of a sequence has; 0 if it is not there."""
        found = self.lengths(name)
        return 0 if found is None else found.length

    def delete(self, name: str) -> bool:
        """Forget a sequence; whether it was there."""
        self._forget(name)
        reply = self._call("DELETE", name, "", {}, [])
        if reply.status != 200:
            raise refusal_of(reply)
        return bool(reply.json().get("deleted"))

    def _read(self, name: str, page: str, query: Mapping[str, str]) -> Reply | None:
        reply = self._call("GET", name, page, query, [])
        if reply.status not in (200, 404):
            raise refusal_of(reply)
        with self._lock:
            count = self.locality[self.owner(name)]
            count.num_reads += 1
            count.num_found += reply.status == 200
        return reply if reply.status == 200 else None

    def _write(
        self, method: str, name: str, layers: Layers, query: Mapping[str, str] | None = None
    ) -> Lengths:
        reply = self._call(method, name, "", query or {}, _lay_out(layers))
        if reply.status == 404:
            self._forget(name)
        if reply.status != 200:
            raise refusal_of(reply)
        with self._lock:
            self._written[name] = None
            self._written.move_to_end(name)
            if len(self._written) > KNOWN_MAX:
                self._written.popitem(last=False)
        return _parse_lengths(reply)

    def _call(
        self,
        method: str,
        name: str,
        page: str,
        query: Mapping[str, str],
        parts: Iterable[bytes | memoryview],
    ) -> Reply:
        owner = self.owner(name)
        with self._lock:
            self.locality[owner].num_asked += 1
        path = f"/v1/sequences/{quote(name, safe='')}{page}"
        return self._peers[owner].call(
            method,
            f"{path}?{urlencode(query)}" if query else path,
            parts,
            deadline_s=self._clock.now_s() + self._deadline_s,
            answer_bytes_max=self._answer_bytes_max,
        )

    def _has_written(self, name: str) -> bool:
        with self._lock:
            return name in self._written

    def _forget(self, name: str) -> None:
        with self._lock:
            self._written.pop(name, None)


def _by_name(daemons: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    if isinstance(daemons, Mapping):
        urls = dict(daemons)
    else:
        named = [(urlsplit(url).netloc, url) for url in daemons]
        urls = dict(named)
        if len(urls) != len(named):
            raise InputError("two daemons have one address: leave one out")
    if not urls:
        raise InputError("no daemon is named: give URLs such as http://127.0.0.1:7000")
    return urls


def _lay_out(layers: Layers) -> list[bytes | memoryview]:
    """The body that holds these layers."""
    if not layers:
        raise InputError("a sequence needs a layer: hand in {0: (keys, values)}")
    named: list[tuple[str, Tensor]] = []
    for layer_idx, (key, value) in sorted(layers.items()):
        named.append((tensor_name(layer_idx, KEY), as_tensor(key)))
        named.append((tensor_name(layer_idx, VALUE), as_tensor(value)))
    header, _ = tensors.make_header([(name, t.dtype, t.shape) for name, t in named])
    return [header, *(tensor.data for _, tensor in named)]


def _parse_layers(body: memoryview) -> dict[int, tuple[Tensor, Tensor]]:
    try:
        start = tensors.LENGTH_BYTES + tensors.parse_length(body[: tensors.LENGTH_BYTES])
        header = body[tensors.LENGTH_BYTES : start]
        pairs = pair_layers(tensors.parse_header(header, len(body) - start))
    except InputError as error:
        raise CorruptDataError(f"what the daemon sent is no sequence: {error}") from error
    data = body[start:]
    return {
        layer_idx: (_cut(data, key), _cut(data, value)) for layer_idx, (key, value) in pairs.items()
    }


def _cut(data: memoryview, place: tensors.TensorPlace) -> Tensor:
    tokens, heads, dim = place.shape
    part = data[place.start : place.start + place.num_bytes]
    return Tensor(place.dtype, (tokens, heads, dim), part)


def _parse_lengths(reply: Reply) -> Lengths:
    told = reply.json()
    try:
        layers = {int(idx): int(length) for idx, length in told["layers"].items()}
        return Lengths(int(told["length"]), layers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptDataError(
            f"the daemon's answer is none about lengths: {told!r:.200}"
        ) from error
