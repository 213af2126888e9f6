"""A router that hands off, all of it real but its sockets, over simulated engines.

Prefill engines keep what they computed under a lease, as vLLM's NixlConnector does: blocks are read
by their numbers, and whoever reads after the lease reads what others have put there since.
"""

import json
from collections.abc import Callable
from typing import Any

from kvkeep.router.relay.framing import ChunkScanner
from kvkeep.router.relay.upstream import UpstreamConnection
from kvkeep.testing.fleet.engine import EngineSettings, SimulatedEngine, SimulatedRequest
from kvkeep.testing.fleet.wires import Serves, Wire
from kvkeep.testing.virtual_time import PausableTime, VirtualTime

FETCH_S = 0.05
"""What a decode engine takes to read another's blocks."""
FOREIGN = "of blocks that hold something else"
"""What an answer says that was computed from them."""
ENGINE = EngineSettings(num_blocks=256, prefill_tokens_s=2000.0, inter_token_s=0.05)
PREFILL_S = 0.1
"""What a prompt of ``PROMPT_TOKENS`` takes at least."""
PROMPT_TOKENS = 200
NUM_ANSWER = 8
"""Tokens of an answer."""
HEAD = b"HTTP/1.1 %d X\r\ncontent-type: %b\r\n%b\r\n"

Passed = Callable[[str, "HandingEngine", str], None]
"""Told that a request, by its id, came to a point on an engine."""


def answer_to(prompt: list[int]) -> str:
    """What an engine answers that computed this prompt, or read its blocks."""
    return f"answer to {prompt[0]}"


class HandingEngine(Serves):
    """A simulated engine behind HTTP: prefills are kept for others, offers are fetched."""

    def __init__(
        self, name: str, time: VirtualTime, fleet: dict[str, "HandingEngine"], lease_s: float
    ) -> None:
        """Start.

        Args:
            name: Also what its offers name it.
            time: Everybody's.
            fleet: By name: where other engines' blocks are.
            lease_s: How long a prefill is kept.
        """
        self.name = name
        self._time, self._fleet, self._lease_s = time, fleet, lease_s
        self.passed: Passed = lambda point, engine, req_id: None
        self.num_starts = 0
        self._busy_until_s = 0.0
        self.num_fetched = 0
        """Offers that were read here."""
        self.start()

    def start(self) -> None:
        """Come up empty."""
        self.is_listening = True
        self.num_starts += 1
        self.time = PausableTime(self._time)
        self.core = SimulatedEngine(self.time, self.num_starts, ENGINE, lambda event: None)
        self.offers: dict[str, SimulatedRequest] = {}
        self._open: set[Served] = set()

    def kill(self) -> None:
        """Die with every connection; what was kept for others is gone."""
        if not self.is_listening:
            return
        self.is_listening = False
        self.time.is_frozen = True  # nothing of it happens any more, ever
        self.core.kill()
        for served in list(self._open):
            served.lose()

    def refuse_for(self, seconds: float) -> None:
        """Answer 503 to what comes for a while; what runs goes on."""
        self._busy_until_s = self._time.now_s() + seconds

    @property
    def is_busy(self) -> bool:
        """Whether it refuses requests now."""
        return self._time.now_s() < self._busy_until_s

    def freeze(self) -> None:
        """Stand still; connections stay open and are taken."""
        self.time.is_frozen = True

    def thaw(self) -> None:
        """Go on."""
        if self.is_listening:
            self.time.thaw()

    @property
    def is_well(self) -> bool:
        """Whether it would answer a probe."""
        return self.is_listening and not self.time.is_frozen

    def connect(self, connection: UpstreamConnection) -> Wire:
        """A router connects."""
        served = Served(self, connection, self._time)
        self._open.add(served)
        return served.wire

    def gone(self, served: "Served") -> None:
        """A connection is over."""
        self._open.discard(served)

    def read(self, offer: dict[str, Any]) -> bool | None:
        """Read the blocks of an offer, and have them freed.

        Returns:
            Whether they were still the offer's; None if they can't be read at all.
        """
        source = self._fleet[offer["remote_engine_id"]]
        if not source.is_listening or offer["generation"] != source.num_starts:
            return None
        self.num_fetched += 1
        held = source.offers.get(offer["remote_request_id"])
        return held is not None and source.core.claim(held)

    def let_go(self, offer: dict[str, Any]) -> None:
        """Tell a prefill engine that nobody will read."""
        source = self._fleet[offer["remote_engine_id"]]
        held = source.offers.get(offer["remote_request_id"])
        if source.is_listening and held is not None and offer["generation"] == source.num_starts:
            source.core.claim(held)


class Served:
    """One connection of a router to an engine, and the request on it."""

    def __init__(
        self, engine: HandingEngine, connection: UpstreamConnection, time: VirtualTime
    ) -> None:
        self._engine, self._connection, self._time = engine, connection, time
        planner = engine.time
        self.wire = Wire(
            time,
            lambda data: planner.after(0.0, lambda: self._received(data)),
            lambda: planner.after(0.0, self._left),
            connection.connection_lost,
        )
        self._data = b""
        self._request: SimulatedRequest | None = None
        self._offer: dict[str, Any] | None = None
        """What is to be read, or is being read."""
        self._is_reading = self._is_gone = False
        self._id = ""

    def lose(self) -> None:
        """The engine died."""
        self._is_gone = True
        self._engine.gone(self)
        self.wire.lose(ConnectionResetError())

    def _left(self) -> None:
        """The router closed the connection: vLLM aborts what runs there."""
        if self._is_gone:
            return
        self._is_gone = True
        self._engine.gone(self)
        if self._request is not None:
            self._engine.core.abort(self._request)
        if self._offer is not None and not self._is_reading:
            self._engine.let_go(self._offer)

    def _say(self, data: bytes) -> None:
        if not self._is_gone:
            self._time.after(0.001, lambda: self._hear(data))

    def _hear(self, data: bytes) -> None:
        if not (self._is_gone or self.wire.is_closing()):
            self._connection.data_received(data)

    def _received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if not end or len(body) < length or self._is_gone:
            return
        self._data = b""
        asked = json.loads(body)
        self._id = head.partition(b"X-Request-Id: ")[2].partition(b"\r\n")[0].decode()
        params = asked.get("kv_transfer_params") or {}
        is_known = asked["model"] == "m"
        if self._engine.is_busy or not is_known:
            # vLLM tells the prefill engine of an offer that it refuses.
            if params.get("do_remote_prefill"):
                self._engine.let_go(params)
            self._say(_whole(503 if is_known else 404, b'{"error":{"message":"no"}}'))
        elif params.get("do_remote_decode"):
            self._prefill(asked["prompt"])
        else:
            self._decode(asked, params)

    # ---- prefill

    def _prefill(self, prompt: list[int]) -> None:
        engine = self._engine
        engine.passed("prefill_received", engine, self._id)
        engine.time.after(PREFILL_S / 2, self._computing)

        def ended(request: SimulatedRequest) -> None:
            self._request = None
            if request.is_failed or self._is_gone:
                return
            engine.passed("prefill_computed", engine, self._id)
            self._say(_whole(200, self._offered()))
            engine.passed("prefill_answering", engine, self._id)

        request = SimulatedRequest(
            prompt, [1], lambda _: engine.passed("prefill_began", engine, self._id), ended,
            hold_s=engine._lease_s,
        )  # fmt: skip
        self._request = engine.offers[self._id] = request
        engine.core.submit(request)

    def _computing(self) -> None:
        if self._request is not None and not self._is_gone:
            self._engine.passed("prefill_computing", self._engine, self._id)

    def _offered(self) -> bytes:
        engine = self._engine
        params = {
            "do_remote_prefill": True,
            "remote_engine_id": engine.name,
            "remote_request_id": self._id,
            "generation": engine.num_starts,
        }
        return json.dumps({"choices": [], "kv_transfer_params": params}).encode()

    # ---- decode

    def _decode(self, asked: dict[str, Any], params: dict[str, Any]) -> None:
        engine = self._engine
        engine.passed("decode_received", engine, self._id)
        if not params:
            self._generate(asked, answer_to(asked["prompt"]))
            return
        self._offer = params
        engine.time.after(FETCH_S / 2, lambda: self._reading(asked))

    def _reading(self, asked: dict[str, Any]) -> None:
        if self._is_gone:
            return
        engine = self._engine
        engine.passed("decode_fetching", engine, self._id)
        self._is_reading = True
        engine.time.after(FETCH_S / 2, lambda: self._read(asked))

    def _read(self, asked: dict[str, Any]) -> None:
        engine, offer = self._engine, self._offer
        assert offer is not None
        was_there = engine.read(offer)
        self._offer = None
        if self._is_gone:
            return
        engine.passed("decode_fetched", engine, self._id)
        # What can't be read at all is computed (kv_load_failure_policy: recompute).
        self._generate(asked, FOREIGN if was_there is False else answer_to(asked["prompt"]))

    def _generate(self, asked: dict[str, Any], text: str) -> None:
        engine, is_stream = self._engine, asked.get("stream")

        def began(_: SimulatedRequest) -> None:
            engine.passed("decode_began", engine, self._id)
            if is_stream:
                self._say(HEAD % (200, b"text/event-stream", b"transfer-encoding: chunked\r\n"))
                self._say(_event({"text": ""}))
            engine.time.after(ENGINE.inter_token_s * NUM_ANSWER / 2, middle)

        def middle() -> None:
            if not self._is_gone:
                engine.passed("decode_streaming", engine, self._id)

        def ended(request: SimulatedRequest) -> None:
            self._request = None
            if request.is_failed or self._is_gone:
                return
            engine.passed("decode_ending", engine, self._id)
            if is_stream:
                self._say(_event({"text": text}) + b"0\r\n\r\n")
            else:
                self._say(_whole(200, json.dumps({"text": text}).encode()))

        self._request = SimulatedRequest(asked["prompt"], [2] * NUM_ANSWER, began, ended)
        engine.core.submit(self._request)


def _whole(status: int, body: bytes) -> bytes:
    return HEAD % (status, b"application/json", b"content-length: %d\r\n" % len(body)) + body


def _event(said: dict[str, str]) -> bytes:
    event = b"data: " + json.dumps(said).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def said_by(response: bytes) -> tuple[int, str, str]:
    """Status, text and error of a response; the text is empty unless the response is whole."""
    head, end, body = response.partition(b"\r\n\r\n")
    if not end:
        return 0, "", "no response"
    status = int(head[9:12])
    if b"transfer-encoding: chunked" in head.lower():
        scanner = ChunkScanner()
        body = b"".join(scanner.feed(body))
        if not scanner.is_done:
            return status, "", "not whole"
        events = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data")]
    else:
        events = [json.loads(body)]
    last = events[-1] if events else {}
    error = last.get("error")
    return status, last.get("text", ""), "" if error is None else str(error["type"])
