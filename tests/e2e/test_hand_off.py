"""A prompt computed on one real engine and answered by another gives what one engine gives."""

import asyncio
import contextlib
import functools
import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from kvkeep.stack.parts import EnginePart
from kvkeep.stack.readiness import complete_one_token, make_client
from kvkeep.validate.prompts import load_words
from tests.e2e.pairs import (
    BLOCK_TOKENS,
    LEASE_S,
    MODEL,
    Pair,
    Question,
    Router,
    Transport,
    client_of,
    read_metrics,
    running_pair,
)
from tests.e2e.sixty import ask_sixty
from tests.waiting import until


# The pair with NIXL is one more to start, on cores that NIXL polls on: not in every run.
@pytest.fixture(scope="module", params=["pool", pytest.param("nixl", marks=pytest.mark.nightly)])
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Two engines, a core each, for all tests of this file."""
    transport: Transport = request.param
    with running_pair(transport, tmp_path_factory.mktemp(f"pair-{transport}")) as found:
        yield found


@pytest.fixture
def pair(started: Pair) -> Pair:
    """Both engines run, whatever an earlier test has killed."""
    started.mend()
    return started


@pytest.mark.timeout(1500, func_only=True)
def test_sixty_answers_are_those_of_a_single_engine(pair: Pair) -> None:
    """Chat and completions, streamed and not, short and long: identical or near-ties, all."""
    sixty = ask_sixty(pair)

    assert sixty.differing == []
    assert sixty.lengths == [answer.prompt_tokens for answer in sixty.single]
    assert (min(sixty.lengths) <= 5, max(sixty.lengths) >= 3000) == (True, True)
    assert len(sixty.answers) == 60
    _assert_moved(pair, sixty.num_loaded)
    assert sixty.is_less_than_a_block_each


def _assert_moved(pair: Pair, num_tokens: float) -> None:
    """What was not computed came from the other engine, in whole blocks."""
    num_blocks = num_tokens / BLOCK_TOKENS
    if pair.transport == "pool":
        told = read_metrics(pair.stack.daemon.metrics_url)
        assert told["kvkeep_host_to_device_total"] >= num_blocks
        assert told["kvkeep_handoffs_whole_total"] >= 1
        assert told["kvkeep_handoffs_partial_total"] == told["kvkeep_handoffs_refused_total"] == 0
    else:
        told = read_metrics(pair.decode.url)
        assert told["vllm:nixl_bytes_transferred_sum"] > 0
        assert told["vllm:nixl_num_failed_transfers_total"] == 0


# ---- aborts, freezes and kills, in each state that a hand-off has on real engines

LEG_S: dict[Transport, float] = {"pool": 6.0, "nixl": 25.0}
"""Router's limit for each leg in the tests below; far above what their prompts take, on engines
that nobody asked yet and, with NIXL, on a core that its thread polls on."""
HANG_S = 150.0
"""No test waits longer for an answer, an error or an empty cache: the limits above, many times."""
LONG_WORDS, SHORT_WORDS = 1900, 40


def _question(num_words: int, max_tokens: int = 6) -> Question:
    return Question(
        f"{num_words} words", " ".join(load_words()[:num_words]), is_chat=False,
        max_tokens=max_tokens,
    )  # fmt: skip


def _faults_routed(
    pair: Pair, leg_s: float | None = None
) -> contextlib.AbstractContextManager[Router]:
    leg_s = leg_s or LEG_S[pair.transport]
    return pair.routed(
        {"upstream_silence_s": leg_s},
        prefill_timeout_s=leg_s, decode_timeout_s=leg_s, prefill_attempts=1, decode_attempts=1,
        offer_lease_s=float(LEASE_S),
    )  # fmt: skip


async def _until(is_so: Callable[[], bool], what: str) -> None:
    # An engine that is asked more often has no time for what it is waited for.
    await until(is_so, what, timeout_s=HANG_S, pause_s=0.05)


def _running(engine: EnginePart) -> float:
    return read_metrics(engine.url)["vllm:num_requests_running"]


def _prefilled(pair: Pair) -> float:
    return read_metrics(pair.prefill.url)["vllm:request_success_total"]


class Client:
    """One request on its way, and what has come of it."""

    def __init__(self, url: str, question: Question) -> None:
        self.chunks: list[dict[str, Any]] = []
        self.error = ""
        self._url, self._question = url, question
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        body = self._question.body(salt=secrets.token_hex(8), is_streamed=True)
        async with (
            client_of(self._url) as client,
            client.stream("POST", self._question.path, json=body | {"ignore_eos": True}) as got,
        ):
            async for line in got.aiter_lines():
                if got.status_code != httpx.codes.OK:
                    self.error += line
                elif line.startswith("data: {"):
                    self.chunks.append(json.loads(line[6:]))

    @property
    def text(self) -> str:
        """What was answered so far."""
        return "".join(c["choices"][0]["text"] for c in self.chunks if c.get("choices"))

    async def computes(self, engine: EnginePart) -> "Client":
        """Wait until an engine works on it; asks once more if that was over before it was seen."""
        client = self
        while not _running(engine):
            if client.task.done():
                assert client.error == "", client.error
                client = Client(self._url, self._question)
            await asyncio.sleep(0.02)
        return client

    async def streams(self) -> "Client":
        """Wait for the first token."""
        await _until(lambda: bool(self.text), "a first token")
        return self

    async def leave(self) -> None:
        """Close the connection."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def fails(self) -> str:
        """Wait for the end, which has to be an error of OpenAI's form; gives its type."""
        await asyncio.wait_for(self.task, HANG_S)
        last = self.chunks[-1] if self.chunks else json.loads(self.error)
        return str(last["error"]["type"])

    async def ends(self) -> str:
        """Wait for the end, which has to be a whole answer."""
        await asyncio.wait_for(self.task, HANG_S)
        reasons = [c["choices"][0]["finish_reason"] for c in self.chunks if c.get("choices")]
        assert (self.error, reasons[-1]) == ("", "length")
        return self.text


async def _prefilling(pair: Pair, router: Router) -> Client:
    """A long prompt that the prefill engine computes now."""
    client = Client(router.url, _question(LONG_WORDS))
    return await asyncio.wait_for(client.computes(pair.prefill), HANG_S)


IN_USE = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)


def _is_idle(engine: EnginePart) -> bool:
    # vLLM tells its figures when a step has ended; an idle engine makes none.
    with make_client(engine.url) as client:
        complete_one_token(client, engine.url, MODEL)
    metrics = read_metrics(engine.url)
    return not any(metrics[name] for name in IN_USE)


async def _until_idle(*engines: EnginePart) -> None:
    """No request is left, and no block: what was held for anybody has been given back."""
    for engine in engines:
        await _until(functools.partial(_is_idle, engine), f"{engine.name} idle")


@pytest.mark.timeout(600, func_only=True)
def test_clients_that_leave_take_their_blocks_along(pair: Pair) -> None:
    """While the prompt is computed, offered, waited for and answered: both caches empty again."""
    with _faults_routed(pair) as router:
        asyncio.run(_abort_everywhere(pair, router))


async def _abort_everywhere(pair: Pair, router: Router) -> None:
    prefilling = await _prefilling(pair, router)
    await prefilling.leave()
    await _until_idle(pair.prefill, pair.decode)

    done = _prefilled(pair)
    with pair.frozen(pair.decode):
        offered = Client(router.url, _question(SHORT_WORDS))
        await _until(lambda: _prefilled(pair) > done, "an offer")
        await offered.leave()
    await _until_idle(pair.prefill, pair.decode)
    await asyncio.to_thread(router.await_ready)

    streaming = await Client(router.url, _question(SHORT_WORDS, max_tokens=2000)).streams()
    await streaming.leave()
    await _until_idle(pair.prefill, pair.decode)


@pytest.mark.timeout(600, func_only=True)
def test_frozen_engines_cost_one_error_each(pair: Pair) -> None:
    """Whichever stands still, and when: a typed error in time, and all is well when it goes on."""
    with _faults_routed(pair) as router:
        asyncio.run(_freeze_everywhere(pair, router))


async def _freeze_everywhere(pair: Pair, router: Router) -> None:
    prefilling = await _prefilling(pair, router)
    with pair.frozen(pair.prefill):
        assert await prefilling.fails() == "upstream_timeout"
    await _until_idle(pair.prefill, pair.decode)
    await asyncio.to_thread(router.await_ready)

    with pair.frozen(pair.decode):
        assert await Client(router.url, _question(SHORT_WORDS)).fails() == "upstream_timeout"
    await _until_idle(pair.prefill, pair.decode)
    await asyncio.to_thread(router.await_ready)

    streaming = await Client(router.url, _question(SHORT_WORDS, max_tokens=2000)).streams()
    with pair.frozen(pair.decode):
        assert await streaming.fails() == "upstream_timeout"
    await _until_idle(pair.prefill, pair.decode)
    await asyncio.to_thread(router.await_ready)
    with_all_thawed = Client(router.url, _question(SHORT_WORDS))
    assert await with_all_thawed.ends()


@pytest.mark.last
@pytest.mark.timeout(600, func_only=True)
def test_killed_engines_cost_their_own_requests_only(pair: Pair) -> None:
    """A dead prefill engine ends no stream, a dead decode engine leaves nothing behind."""
    # Patient legs: the decode engine stands still while three things are brought about.
    with _faults_routed(pair, leg_s=HANG_S) as router:
        asyncio.run(_kill_both(pair, router))


async def _kill_both(pair: Pair, router: Router) -> None:
    """The prefill engine with one prompt offered and one being computed; then the other."""
    wanted = await Client(router.url, _question(SHORT_WORDS)).ends()
    streaming = await Client(router.url, _question(SHORT_WORDS, max_tokens=2000)).streams()
    done = _prefilled(pair)
    with pair.frozen(pair.decode):
        offered = Client(router.url, _question(SHORT_WORDS))
        await _until(lambda: _prefilled(pair) > done, "an offer")
        prefilling = await _prefilling(pair, router)
        await asyncio.to_thread(pair.prefill.kill)
        assert await prefilling.fails() == "upstream_error"
    num_chunks = len(streaming.chunks)
    await _until(lambda: len(streaming.chunks) > num_chunks, "a stream that goes on")
    await _assert_offer_ended(pair, offered, wanted)

    await asyncio.to_thread(pair.decode.kill)
    assert await streaming.fails() == "upstream_error"


async def _assert_offer_ended(pair: Pair, offered: Client, wanted: str) -> None:
    """Through the pool its blocks outlive who computed them; NIXL has nobody to read them from."""
    if pair.transport == "pool":
        assert await offered.ends() == wanted
    else:
        await asyncio.wait_for(offered.task, HANG_S)
        assert offered.error or offered.text in ("", wanted)


# Through NIXL it reads another engine's memory, and needs nobody for that.
@pytest.mark.parametrize("started", ["pool"], indirect=True)
@pytest.mark.nightly  # its engine has to be started again for whoever comes next
@pytest.mark.timeout(600, func_only=True)
def test_a_decode_engine_killed_while_it_waits_leaves_nothing(pair: Pair) -> None:
    """Its client is told, the prefill engine goes on, and the daemon lends nothing to the dead."""
    with _faults_routed(pair) as router:
        asyncio.run(_kill_decode_while_it_waits(pair, router))


async def _kill_decode_while_it_waits(pair: Pair, router: Router) -> None:
    stored = _told(pair, "kvkeep_blocks_stored_total")
    with pair.frozen(pair.decode):
        waiting = Client(router.url, _question(SHORT_WORDS))
        await _until(lambda: _told(pair, "kvkeep_blocks_stored_total") > stored, "an offer")
        os.kill(pair.stack.daemon.pid, signal.SIGSTOP)
    try:
        await _until(lambda: _waiting(pair.decode) > 0, "a request that waits for its blocks")
        await asyncio.to_thread(pair.decode.kill)
        assert await waiting.fails() == "upstream_error"
        assert waiting.text == ""
    finally:
        os.kill(pair.stack.daemon.pid, signal.SIGCONT)
    await _until_idle(pair.prefill)
    await _until(lambda: not _told(pair, "kvkeep_read_leases"), "no block lent")


def _told(pair: Pair, name: str) -> float:
    return read_metrics(pair.stack.daemon.metrics_url)[name]


def _waiting(engine: EnginePart) -> float:
    return read_metrics(engine.url)["vllm:num_requests_waiting"]
