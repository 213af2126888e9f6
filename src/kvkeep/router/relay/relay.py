"""The relay as a whole: its clients, its connections to engines, its clock, and its end."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from kvkeep.model.clock import Clock
from kvkeep.router.limits.gate import Gate
from kvkeep.router.on_demand.desk import StartDesk
from kvkeep.router.policies.base import Choice, Needs
from kvkeep.router.relay.framing import RequestHead
from kvkeep.router.relay.local import LocalAnswers
from kvkeep.router.relay.reader import Request
from kvkeep.router.relay.server import ClientConnection
from kvkeep.router.relay.settings import RelaySettings
from kvkeep.router.relay.upstream import EndpointPool, UpstreamConnection
from kvkeep.router.request import (
    RequestView,
    find_key,
    find_key_header,
    find_model,
    parse_fields,
)
from kvkeep.router.router import Router
from kvkeep.router.snapshot import Endpoint, Role
from kvkeep.router.tokenizing import BYTES_PER_TOKEN, Prefixes, Tokenizing, approximate_prefix

if TYPE_CHECKING:
    from kvkeep.router.cartridges.desk import CartridgeDesk

LOOK_S: Final = 0.25
"""How often time limits are looked at; each is kept to about so much."""
_KEY_ALONE: Needs = Needs.KEY
LINES_MAX: Final = 4096
"""Of remembered X-Kvkeep-Route lines."""


class Begins(Protocol):
    """Who serves requests in a way of their own."""

    @property
    def is_ready(self) -> bool:
        """Whether requests can be served now."""
        ...

    def begin(self, client: ClientConnection, request: Request, view: RequestView) -> None:
        """Serve a request that was let in."""
        ...

    def look(self, now_s: float) -> None:
        """See to what may take too long and is no client's."""
        ...

    def close(self) -> None:
        """End that at once."""
        ...


class Relay:
    """Everything that one listening address needs."""

    def __init__(
        self,
        router: Router,
        gate: Gate,
        settings: RelaySettings,
        clock: Clock,
        *,
        asks_keys: bool = False,
        tokenizing: Tokenizing | None = None,
    ) -> None:
        """Have no clients; ``look`` has to be called every ``LOOK_S``."""
        self._prefixes_of = None if tokenizing is None else Prefixes(tokenizing, clock)
        self.router, self.gate, self.settings, self.clock = router, gate, settings, clock
        self._asks_keys = asks_keys
        self._prefixes = tuple(prefix.encode("ascii") for prefix in settings.prefixes)
        self._pools: dict[Endpoint, EndpointPool] = {}
        self.make_pool: Callable[[Endpoint, float], EndpointPool] = EndpointPool
        """Where connections come from; simulations have none to real engines."""
        self._lines: dict[tuple[str, str, str, str], bytes] = {}
        self._fleet_version = -1
        self._local = LocalAnswers(self)
        self.handoffs: Begins | None = None
        """Who serves requests by hand-off; None: each goes to one engine."""
        self.cartridges: CartridgeDesk | None = None
        """Who finds the cartridges that requests name; None: they are not looked for."""
        self.clients: set[ClientConnection] = set()
        self.connecting: set[asyncio.Task[UpstreamConnection]] = set()
        self.now_s = clock.now_s()
        """The time of the last look: exact enough for limits of seconds, and free."""
        self.desk: StartDesk | None = None
        """Where requests wait for engines that start on demand; None where none do."""
        self.num_pumps, self.pumps_max = 0, 1 << 20
        """Streams that pass from socket to socket; each takes a descriptor that others may need."""
        self.is_draining = False
        self.num_refused = 0
        self.num_malformed = 0

    # --- What a request needs to know ------------------------------------------------------------

    def view_of(self, request: Request) -> RequestView:
        """What the policy may look at, worked out as far as it is needed."""
        head = request.head
        needs = self.router.needs
        if needs is Needs.NOTHING:
            return RequestView("")
        view = RequestView(head.target.partition(b"?")[0].decode("ascii"))
        if needs is _KEY_ALONE or Needs.KEY in needs:
            view.key = find_key_header(head.raw)
            if needs is _KEY_ALONE and view.key is not None:
                return view
        fields = parse_fields(request.body) if request.is_whole and request.body else None
        if fields is not None:
            view.model = find_model(fields)
            if view.key is None and Needs.KEY in needs:
                view.key = find_key(fields)
        if Needs.TOKENS in needs:
            view.num_tokens = max(len(request.body), head.length) // BYTES_PER_TOKEN
        if Needs.PREFIX in needs and request.is_whole and self._prefixes_of is None:
            prefix = approximate_prefix(request.body)
            if prefix is not None:
                view.prefix, view.num_tokens = prefix
        return view

    def prepare(self, request: Request, view: RequestView, then: Callable[[], None]) -> None:
        """Call ``then`` once the view is complete: at once, unless the prompt is tokenized."""
        if self._prefixes_of is None or not self.is_tokenizing(request):
            then()
        else:
            self._prefixes_of.fill(request.body, view, then)

    def is_tokenizing(self, request: Request) -> bool:
        """Whether the prompt of a request is to be tokenized, which takes a while."""
        return self._prefixes_of is not None and request.is_whole and bool(request.body)

    @property
    def num_untokenized(self) -> int:
        """Prompts that had to be routed by load."""
        return 0 if self._prefixes_of is None else self._prefixes_of.num_missing

    def find_authorization(self, head: RequestHead) -> bytes | None:
        """The header that the gate asks for, if it asks."""
        return head.field(b"authorization") if self._asks_keys else None

    def estimate_tokens(self, request: Request) -> int:
        """About how many tokens a prompt has, before anybody looked at it; 0 if nobody asks."""
        if not self._asks_keys:
            return 0
        return max(len(request.body), request.head.length) // BYTES_PER_TOKEN

    def answer_locally(self, client: ClientConnection, request: Request) -> bool:
        """Answer what is not for one engine; returns whether it was that."""
        target = request.head.target
        if target.startswith(self._prefixes) and not target.startswith(b"/v1/models"):
            return False
        return self._local.answer(client, request)

    def is_relayed(self, path: bytes) -> bool:
        """Whether clients may reach this path of an engine."""
        return path.startswith(self._prefixes)

    def route_line(self, choice: Choice, policy: str, note: str) -> bytes:
        """The header that says which endpoint was chosen, by which policy and why."""
        name = "none" if choice.endpoint is None else choice.endpoint.name
        key = (name, choice.reason, policy, note)
        line = self._lines.get(key)
        if line is None:
            text = f"{name}; {policy}; {choice.reason}" + (f"; {note}" if note else "")
            safe = "".join(letter if " " <= letter <= "~" else "?" for letter in text)
            if len(self._lines) >= LINES_MAX:
                self._lines.clear()
            line = self._lines[key] = f"X-Kvkeep-Route: {safe}\r\n".encode("ascii")
        return line

    def pool_of(self, endpoint: Endpoint) -> EndpointPool:
        """The connections to an endpoint."""
        pool = self._pools.get(endpoint)
        if pool is None:
            pool = self.make_pool(endpoint, self.settings.connect_timeout_s)
            self._pools[endpoint] = pool
        return pool

    @property
    def is_ready(self) -> bool:
        """Whether requests can be served now, or once an engine has started for them."""
        if self.handoffs is not None:
            return self.handoffs.is_ready
        return self.desk is not None or bool(self.router.fleet.ready(Role.SERVE, None))

    @property
    def num_upstream(self) -> int:
        """Connections to engines."""
        return sum(pool.num_open for pool in self._pools.values())

    # --- Time and the end ------------------------------------------------------------------------

    def look(self) -> None:
        """See to everything that may take too long."""
        now_s = self.now_s = self.clock.now_s()
        self.gate.tick(now_s)
        if self.desk is not None:
            self.desk.tick(now_s)
        if self._prefixes_of is not None:
            self._prefixes_of.look(now_s)
        for client in list(self.clients):
            client.look(now_s)
        if self.handoffs is not None:
            self.handoffs.look(now_s)
        for pool in self._pools.values():
            pool.close_idle(now_s - self.settings.upstream_idle_s)
        if self._fleet_version != self.router.fleet.version:
            self._fleet_version = self.router.fleet.version
            self._forget_absent()

    def _forget_absent(self) -> None:
        """Close the idle connections to endpoints that left; what runs there still ends."""
        present = set(self.router.fleet)
        for endpoint in [endpoint for endpoint in self._pools if endpoint not in present]:
            self._pools[endpoint].retire()
            if not self._pools[endpoint].num_open:
                del self._pools[endpoint]

    def drain(self) -> None:
        """Take no further request; what runs goes on."""
        self.is_draining = True
        self.gate.drain()
        if self.desk is not None:
            self.desk.drain()

    @property
    def is_quiet(self) -> bool:
        """Whether no request is served."""
        return all(client.is_idle for client in self.clients)

    async def close(self) -> None:
        """End whatever is left, at once; afterwards nothing is open."""
        for client in list(self.clients):
            client.stop("the router stops")
        # What was written last leaves in the loop's next turns.
        for _ in range(3):
            await asyncio.sleep(0)
        for client in list(self.clients):
            client.transport.abort()
        if self.handoffs is not None:
            self.handoffs.close()
        for task in list(self.connecting):
            task.cancel()
        await asyncio.gather(*self.connecting, return_exceptions=True)
        for pool in self._pools.values():
            pool.close()
        await self._local.close()
        await asyncio.sleep(0)
