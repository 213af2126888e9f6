"""Two hosts with a real engine each share KV through a store; losing any of them loses no answer.

Hosts are network namespaces. A stack that is started by a thread which has entered one is of that
host altogether: daemon, engine, and every question asked of them. In the exact mode an answer from
stored KV equals a computed one to the bit. Shared means: served by the other host's daemon.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.stack.precedence import load_spec
from kvkeep.stack.readiness import make_client
from kvkeep.stack.supervisor import Stack
from kvkeep.validate.answer import Answer
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import documents
from tests.integration.daemons import wait_until
from tests.servers.hosts import Host, three_hosts
from tests.servers.mooncake import MIB
from tests.servers.seaweed import KEY, SECRET
from tests.servers.shared_store import KINDS, SharedStore

pytestmark = [pytest.mark.root, pytest.mark.allow_hosts(["127.0.0.1", "192.0.2.3"])]

NUM_WORDS = 150
BLOCK_TOKENS = 32
SERVED_SHARE = 0.9
SAMPLING = Sampling(max_tokens=4)
REQUEST_TIMEOUT_S = 60.0
"""An answer that takes longer has failed."""
TIER_TIMEOUT_S = 2.0
BACK_TIMEOUT_S = 120.0
TRIES_MAX = 5
EXAMPLES = {
    "object_store": Path(__file__).parents[2] / "examples" / "two-hosts-s3.yaml",
    "mooncake": Path(__file__).parents[2] / "examples" / "two-hosts-mooncake.yaml",
}
"""What the project shows for each kind; addresses, sizes and waits are the test's."""

STACK = """\
name: {name}
model: smollm2
exact: true
daemon:
  pool_bytes: 256MiB
  settings: {{planner: load}}
engines:
  - name: a
    cpus: "{cpu}"
    kv_cache_bytes: 256MiB
    max_model_len: 2048
    connector_settings: {{patience_ms: 10000}}
"""

_seeds = itertools.count(1)


def fresh(num: int) -> list[str]:
    """Prompts that nobody has seen yet."""
    return [doc.prompt().text for doc in documents(num, NUM_WORDS, seed=next(_seeds))]


# --- Two hosts and a store ------------------------------------------------------------------------


@dataclass
class Server:
    """A host with its daemon and its engine."""

    host: Host
    stack: Stack

    def ask(self, texts: Sequence[str]) -> list[Answer]:
        """Ask for each text, with nothing in the engine's own cache; all are answered."""
        with self.host.entered():
            answers = asyncio.run(self._ask(texts))
        assert [answer.error for answer in answers] == [None] * len(texts)
        return answers

    async def _ask(self, texts: Sequence[str]) -> list[Answer]:
        engine = Endpoint(
            self.stack.engines["a"].url, model=self.stack.model_name, timeout_s=REQUEST_TIMEOUT_S
        )
        async with engine:
            assert (await engine.reset_prefix_cache()).ok
            answers = [await engine.chat(text, SAMPLING) for text in texts]
            assert (await engine.reset_prefix_cache()).ok  # true only when no store is in flight
        return answers

    def status(self) -> dict[str, Any]:
        """What its daemon says of itself."""
        with self.host.entered(), make_client(self.stack.daemon.metrics_url) as client:
            found: dict[str, Any] = client.get(f"{self.stack.daemon.metrics_url}/status").json()
        return found

    def num_promoted(self) -> int:
        """Blocks that its daemon read from the store."""
        return int(self.status()["counters"]["blocks_promoted"])

    def settle(self) -> None:
        """Wait until its daemon has nothing to write to the store."""

        def is_quiet() -> bool:
            movement = self.status()["movement"]
            is_queued = any(tier["queued_bytes"] for tier in movement["tiers"])
            return not movement["cascades_waiting"] and not is_queued

        wait_until(is_quiet, "all is in the store", BACK_TIMEOUT_S)

    def kill_daemon(self) -> None:
        """End its daemon without warning; the pool is gone too."""
        self.stack.daemon.kill()
        Path(self.stack.daemon.pool).unlink()

    def start_daemon(self) -> None:
        """Start the daemon again; the engine finds it by itself."""
        with self.host.entered():
            self.stack.daemon.restart()

    def put_below(self, tier: dict[str, object]) -> None:
        """Give its daemon an empty pool and this tier below."""
        daemon = msgspec.structs.replace(self.stack.spec.daemon, tiers=[tier])
        self.stack.spec = msgspec.structs.replace(self.stack.spec, daemon=daemon)
        self.kill_daemon()
        self.start_daemon()


@dataclass
class Site:
    """What a test may break, and has to mend."""

    store: SharedStore
    servers: tuple[Server, Server]

    def ask_both(self, one: Sequence[str], other: Sequence[str]) -> list[list[Answer]]:
        """Ask each host for its texts at the same time: they have a core each."""
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(Server.ask, self.servers, (one, other)))

    def wait_until_shared(self) -> None:
        """Wait until each host is served what the other has answered."""
        for source, target in itertools.permutations(self.servers):
            wait_until(lambda: is_shared(source, target), "shared", BACK_TIMEOUT_S)  # noqa: B023


def is_shared(source: Server, target: Server) -> bool:
    """Whether one host is served what the other has answered; its answer is right in any case."""
    texts, before = fresh(1), target.num_promoted()
    computed = source.ask(texts)
    source.settle()
    answers = target.ask(texts)
    assert [answer.steps for answer in answers] == [answer.steps for answer in computed]
    return served_share(answers) >= SERVED_SHARE and target.num_promoted() > before


def served_share(answers: Sequence[Answer]) -> float:
    """How much of what could come from stored KV did."""
    servable = sum(((answer.prompt_tokens or 0) - 1) // BLOCK_TOKENS for answer in answers)
    return sum(answer.cached_tokens or 0 for answer in answers) / (servable * BLOCK_TOKENS)


def account(site: Site, answers: Sequence[Answer]) -> str:
    """What was served of each prompt, and what the daemons did."""
    served = [f"{answer.cached_tokens}/{answer.prompt_tokens}" for answer in answers]
    told = [(found["counters"], found["movement"]) for found in map(Server.status, site.servers)]
    return f"served {' '.join(served)}; {told}"


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host, Host]]:
    """Two hosts for engines, and one for a store."""
    with three_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def servers(
    hosts: tuple[Host, Host, Host], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """A stack on each of two hosts, both started at once; their daemons have no tier yet."""

    def made(number: int) -> Server:
        folder = tmp_path_factory.mktemp(f"host-{number}")
        file = folder / "stack.yaml"
        file.write_text(STACK.format(name=f"two-hosts-{number}", cpu=number))
        return Server(hosts[number], Stack(load_spec(file), state_dir=folder / "state"))

    def start(server: Server) -> None:
        with server.host.entered():
            server.stack.start()

    with pytest.MonkeyPatch.context() as environment, contextlib.ExitStack() as ends:
        environment.setenv("AWS_ACCESS_KEY_ID", KEY)
        environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        both = made(0), made(1)
        for server in both:
            ends.callback(server.stack.stop)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(start, both))
        yield both


@pytest.fixture(scope="module", params=KINDS)
def site(
    request: pytest.FixtureRequest,
    hosts: tuple[Host, Host, Host],
    servers: tuple[Server, Server],
) -> Iterator[Site]:
    """Both hosts above a store, with empty pools; engines stay from one store to the next."""
    store = SharedStore(request.param, hosts[2], segment_bytes=256 * MIB)
    try:
        store.start()
        (example,) = load_spec(EXAMPLES[request.param]).daemon.tiers
        for server in servers:
            here = store.tier(server.host, timeout_s=TIER_TIMEOUT_S)
            server.put_below(example | here)
        site = Site(store, servers)
        site.wait_until_shared()
        yield site
    finally:
        store.end()


# --- The tests ------------------------------------------------------------------------------------


def exchange(site: Site) -> str:
    """Have each host asked for what is new and then for what the other answered: all is right.

    Returns:
        What happened where too little came from the other, as a busy machine finds blocks too late
        to wait for them; empty where enough did.
    """
    texts = fresh(3), fresh(3)
    before = [server.num_promoted() for server in site.servers]
    computed = site.ask_both(*texts)
    for server in site.servers:
        server.settle()
    served = site.ask_both(*reversed(texts))
    promoted = [server.num_promoted() for server in site.servers]
    is_enough = all(new > old for old, new in zip(before, promoted, strict=True))
    for answers, others in zip(computed, reversed(served), strict=True):
        assert max(answer.cached_tokens or 0 for answer in answers) <= BLOCK_TOKENS
        assert [answer.steps for answer in others] == [answer.steps for answer in answers]
        is_enough &= served_share(others) >= SERVED_SHARE
    return "" if is_enough else account(site, [answer for found in served for answer in found])


def test_what_one_host_answered_the_other_serves(site: Site) -> None:
    """In both directions, with the same tokens and logprobs; neither daemon knows the other."""
    tries = [exchange(site)]
    while tries[-1] and len(tries) < TRIES_MAX:
        tries.append(exchange(site))

    assert tries[-1] == ""


def check_alone(site: Site, known: Sequence[str], computed: Sequence[Answer]) -> None:
    """Ask both hosts for what is known and for what is new while something is broken."""
    new = fresh(2)
    answers = site.ask_both([*known, *new], [*known, *new])

    one, other = ([answer.steps for answer in found] for found in answers)
    assert one[: len(known)] == [answer.steps for answer in computed]
    assert one == other
    for found in answers:  # equal, and nobody had it from anybody
        assert max(answer.cached_tokens or 0 for answer in found[len(known) :]) <= BLOCK_TOKENS


def test_a_host_that_is_cut_off_loses_no_answer(site: Site) -> None:
    """With its cable out it is served by its own pool or computes; then both share again."""
    one, _ = site.servers
    known = fresh(2)
    computed = one.ask(known)
    one.settle()
    one.host.cut()
    try:
        check_alone(site, known, computed)
        assert served_share(one.ask(known)) >= SERVED_SHARE
    finally:
        one.host.join()

    site.wait_until_shared()


def test_a_host_that_died_loses_no_answer(site: Site) -> None:
    """Its daemon, its pool and what it lent to the store are gone; then both share again."""
    _, other = site.servers
    known = fresh(2)
    computed = other.ask(known)
    other.settle()
    other.host.cut()
    other.kill_daemon()
    try:
        check_alone(site, known, computed)
    finally:
        other.host.join()
        other.start_daemon()

    site.wait_until_shared()


def test_a_store_that_died_loses_no_answer(site: Site) -> None:
    """Each host is served by its own pool or computes; then both share again."""
    one, _ = site.servers
    known = fresh(2)
    computed = one.ask(known)
    one.settle()
    site.store.kill()
    try:
        check_alone(site, known, computed)
        assert served_share(one.ask(known)) >= SERVED_SHARE
    finally:
        site.store.start()

    site.wait_until_shared()
