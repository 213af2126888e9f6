"""One fault at one point of one hand-off, among others, in virtual time and from one seed."""

import asyncio
import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kvkeep.router.health.book import Outcome
from kvkeep.router.relay.relay import LOOK_S
from kvkeep.router.relay.server import ClientConnection
from kvkeep.router.run import Parts
from kvkeep.router.settings import load_settings
from kvkeep.router.snapshot import Endpoint
from kvkeep.testing.fleet.handing import (
    FOREIGN,
    PROMPT_TOKENS,
    HandingEngine,
    answer_to,
    said_by,
)
from kvkeep.testing.fleet.wires import Wire, WirePool
from kvkeep.testing.virtual_time import VirtualTime

POINTS = (
    *("client_sent", "prefill_received", "prefill_computing", "prefill_began", "prefill_computed"),
    *("prefill_answering", "decode_received", "decode_fetching", "decode_fetched", "decode_began"),
    *("client_heard", "decode_streaming", "decode_ending"),
)
"""Of a hand-off, in their order."""
FAULTS = (
    *("kill_prefill", "kill_decode", "freeze_prefill", "freeze_decode"),
    *("busy_prefill", "busy_decode"),
    *("client_leaves", "router_stops"),
)
LEG_S = 2.0
LEASE_S = 6.0
SILENCE_S = 3.0
ATTEMPTS = (2, 3)
DEADLINE_S = LEG_S * sum(ATTEMPTS) + SILENCE_S + 5.0
"""No client waits longer: both legs as often as they may be tried, a silence, and an answer."""
NUM_CLIENTS = 4
RESTART_S = 3.0
BUSY_S = 1.0
FREEZES_S = (0.5, 4.0, 12.0)
PROBE_S = 0.5
SOON_S = 0.01
"""By then everybody has heard that a client left."""
SHAPES = ((1, 2), (2, 1), (2, 2), (1, 1))
"""Prefill engines, decode engines."""


@dataclass
class Client:
    """One client and what it got."""

    name: str
    prompt: list[int]
    is_stream: bool
    sent_s: float
    wire: Wire | None = None
    heard: bytes = b""
    ended_s: float | None = None
    has_left: bool = False
    connection: ClientConnection | None = field(default=None, repr=False)

    @property
    def is_over(self) -> bool:
        """Whether it waits for nothing any more."""
        return self.has_left or self.ended_s is not None


class HandOffSimulation:
    """Some clients at once, one of whom meets a fault."""

    def __init__(self, seed: int, point: str, fault: str) -> None:
        """Plan it.

        Args:
            seed: Of the fleet's shape, who asks when, who is struck, and whether to fall back.
            point: When: one of ``POINTS``.
            fault: What: one of ``FAULTS``.
        """
        self.chance = chance = Random(f"{seed} {point} {fault}")
        self._point, self._fault = point, fault
        self.time = VirtualTime()
        self.engines: dict[str, HandingEngine] = {}
        self.is_lenient = chance.random() < 0.5
        num_prefill, num_decode = SHAPES[seed % len(SHAPES)]
        self._roles = {
            **{f"p{idx}": "prefill" for idx in range(num_prefill)},
            **{f"d{idx}": "decode" for idx in range(num_decode)},
        }
        for name in self._roles:
            engine = HandingEngine(name, self.time, self.engines, LEASE_S)
            engine.passed = self._passed
            self.engines[name] = engine
        self.parts = Parts(load_settings(None, {}, self._settings()), self.time)
        relay = self.parts.relay
        relay.make_pool = self._make_pool
        self.clients = [
            Client(
                f"r{idx}",
                [seed * 1000 + idx, *chance.choices(range(50_000), k=PROMPT_TOKENS - 1)],
                is_stream=chance.random() < 0.7,
                sent_s=1.0 + chance.random(),
            )
            for idx in range(NUM_CLIENTS)
        ]
        self._victim = chance.choice(self.clients)
        self._num_roles = {"prefill": num_prefill, "decode": num_decode}
        self._works: dict[str, HandingEngine] = {}
        """By role: where the victim's request is or was."""
        self.was_struck = False
        self.passed_in_vain: list[str] = []
        """Points to which the victim's request came after its client had left."""
        self._left_s = 0.0
        self._calm_s = 0.0
        """When everything has recovered."""

    def _settings(self) -> dict[str, Any]:
        return {
            "engines": [
                {"url": f"http://127.0.0.1:{idx + 1}", "name": name, "role": role}
                for idx, (name, role) in enumerate(self._roles.items())
            ],
            "handoff": {
                "transport": "nixl",
                "min_tokens": 0,
                "fallback": "decode_alone" if self.is_lenient else "none",
                "prefill_timeout_s": LEG_S,
                "decode_timeout_s": LEG_S,
                "prefill_attempts": ATTEMPTS[0],
                "decode_attempts": ATTEMPTS[1],
                "offer_lease_s": LEASE_S,
                "offer_margin_s": 1.0,
            },
            "relay": {"upstream_silence_s": SILENCE_S, "upstream_idle_s": 1.0},
            "health": {"interval_s": PROBE_S, "timeout_s": 1.0, "pause_s": 1.0},
        }

    def _make_pool(self, endpoint: Endpoint, connect_timeout_s: float) -> WirePool:
        return WirePool(endpoint, connect_timeout_s, self.engines[endpoint.name])

    # ---- the fault

    def _passed(self, point: str, engine: HandingEngine | None, req_id: str) -> None:
        """A request came to a point."""
        if req_id != self._victim.name:
            return
        if self._victim.has_left and self.time.now_s() > self._left_s + SOON_S:
            self.passed_in_vain.append(point)
        if engine is not None:
            self._works[self._roles[engine.name]] = engine
        if point == self._point and not self.was_struck:
            self.was_struck = True
            self._strike()

    def _strike(self) -> None:
        verb, _, role = self._fault.partition("_")
        if verb == "client":
            self._leave(self._victim)
            return
        if verb == "router":
            # As at its end; that it serves again afterwards shows what it left behind.
            for connection in list(self.parts.relay.clients):
                connection.stop("the router stops")
            return
        others = [self.engines[name] for name, each in self._roles.items() if each == role]
        engine = self._works.get(role) or self.chance.choice(others)
        if verb == "busy":
            engine.refuse_for(BUSY_S)
        elif verb == "kill":
            engine.kill()
            self._recover(RESTART_S, engine.start)
        else:
            engine.freeze()
            self._recover(self.chance.choice(FREEZES_S), engine.thaw)

    def _recover(self, after_s: float, action: Any) -> None:
        self._calm_s = self.time.now_s() + after_s
        self.time.after(after_s, action)

    # ---- clients

    def _send(self, client: Client) -> None:
        connection = ClientConnection(self.parts.relay)
        client.connection = connection
        client.wire = Wire(
            self.time,
            lambda data: self._hear(client, data),
            lambda: self._over(client),
            connection.connection_lost,
        )
        connection.connection_made(client.wire)
        asked = {"model": "m", "prompt": client.prompt, "max_tokens": 8, "stream": client.is_stream}
        body = json.dumps(asked).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            f"X-Request-Id: {client.name}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.data_received(head.encode() + body)
        self._passed("client_sent", None, client.name)

    def _hear(self, client: Client, data: bytes) -> None:
        if client.has_left:
            return
        is_first, client.heard = not client.heard, client.heard + data
        if is_first:
            self._passed("client_heard", None, client.name)

    def _over(self, client: Client) -> None:
        client.ended_s = self.time.now_s()

    def _leave(self, client: Client) -> None:
        assert client.wire is not None
        client.has_left, self._left_s = True, self.time.now_s()
        client.wire.lose(None)

    # ---- time

    async def run(self) -> None:
        """Run it, look after everything until all has recovered, and ask once more."""
        self._probe()
        self._look()
        for client in self.clients:
            self.time.after(client.sent_s, lambda client=client: self._send(client))  # type: ignore[misc]
        await self._until(2.0 + DEADLINE_S)
        await self._until(max(self.time.now_s(), self._calm_s) + LEASE_S + 3.0)
        self.check_idle()
        last = Client("last", [7, *range(PROMPT_TOKENS - 1)], False, self.time.now_s())
        self._send(last)
        self.clients.append(last)
        await self._until(self.time.now_s() + LEASE_S)

    async def _until(self, end_s: float) -> None:
        connecting = self.parts.relay.connecting
        while self.time.step(end_s):
            if connecting:
                # Who was asked for a connection answers within the loop's next turns.
                await asyncio.wait(connecting)
                await asyncio.sleep(0)
        self.time.run_until(end_s)

    def _look(self) -> None:
        self.parts.relay.look()
        self.time.after(LOOK_S, self._look)

    def _probe(self) -> None:
        """As the router's prober does."""
        book = self.parts.book
        for endpoint in book.due(self.time.now_s()):
            engine = self.engines[endpoint.name]
            found = Outcome.FINISHED if engine.is_listening else Outcome.UNREACHABLE
            is_silent = engine.is_listening and not engine.is_well
            outcome, after_s = (Outcome.TIMEOUT, 1.0) if is_silent else (found, 0.01)
            self.time.after(after_s, lambda e=endpoint, o=outcome: self._probed(e, o))  # type: ignore[misc]
        self.time.after(PROBE_S / 2, self._probe)

    def _probed(self, endpoint: Endpoint, outcome: Outcome) -> None:
        self.parts.book.probed(endpoint, outcome, self.time.now_s(), None)

    # ---- what must hold

    def check_idle(self) -> None:
        """Raise AssertionError if anything is left of what ended."""
        for engine in self.engines.values():
            engine.core.check_idle()
            assert engine.core.num_offered == 0, f"{engine.name} keeps an offer"
            assert engine.core.cache.num_held == 0, f"{engine.name} keeps blocks"
        for endpoint in self.parts.fleet:
            assert endpoint.num_in_flight == 0, f"{endpoint.name} is busy"
            assert endpoint.queued_tokens == 0
        assert self.parts.gate.num_running == 0
        assert self.parts.relay.is_quiet

    def _must_be_answered(self, client: Client) -> bool:
        """Whether there was another engine that could do what the one that was struck did not."""
        verb, _, role = self._fault.partition("_")
        if verb not in ("kill", "freeze", "busy") or self._num_roles[role] < 2:
            return False
        if role == "prefill" or verb == "busy":
            return True
        is_early = POINTS.index(self._point) < POINTS.index("decode_began")
        return self.is_lenient and is_early and client is self._victim

    def check_answers(self) -> None:
        """Raise AssertionError if a client hangs, or has what is not its answer."""
        assert not self.passed_in_vain, f"worked for nobody: {self.passed_in_vain}"
        for client in self.clients:
            if client.has_left:
                continue
            assert client.ended_s is not None, f"{client.name} hangs"
            assert client.ended_s - client.sent_s <= DEADLINE_S, f"{client.name} was late"
            status, text, error = said_by(client.heard)
            assert FOREIGN not in client.heard.decode(), "blocks of others were read"
            assert text or not self._must_be_answered(client), f"{client.name} needed no {error}"
            if text:
                assert (status, text) == (200, answer_to(client.prompt))
            else:
                assert error in ("upstream_error", "upstream_timeout", "overloaded_error"), error
        assert said_by(self.clients[-1].heard)[:2] == (200, answer_to(self.clients[-1].prompt))
