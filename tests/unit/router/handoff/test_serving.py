"""A hand-off between buffers: what the router does when an answer, or the lack of one, is odd."""

import asyncio
import json
from typing import Any

import pytest

from kvkeep.router.relay.upstream import EndpointPool, UpstreamConnection
from kvkeep.router.snapshot import Endpoint
from tests.unit.router.relay.wires import STREAM, Room, Wire, request, response, split

PROMPT = json.dumps({"prompt": "word " * 200, "stream": True}).encode()
OFFER = b'{"do_remote_prefill":true,"remote_block_ids":[[1,2]]}'
OFFERED = b'{"kv_transfer_params":' + OFFER + b"}"
LEG_S = 5.0
EVENT = b"data: 1\n\n"


def room(
    *,
    idle: int = 4,
    limits: dict[str, Any] | None = None,
    relay: dict[str, Any] | None = None,
    **handoff: Any,
) -> Room:
    """Two engines of each role: ports 1 and 2 prefill, 3 and 4 decode."""
    roles = ("prefill", "prefill", "decode", "decode")
    engines = [
        {"url": f"http://127.0.0.1:{port + 1}", "role": role} for port, role in enumerate(roles)
    ]
    told = {
        "transport": "nixl",
        "min_tokens": 0,
        "prefill_timeout_s": LEG_S,
        "decode_timeout_s": LEG_S,
        **handoff,
    }
    return Room(idle=idle, engines=engines, handoff=told, limits=limits or {}, relay=relay or {})


def outcomes(of: Room) -> dict[str, int]:
    """What was counted, but for zeros."""
    desk = of.parts.handoffs
    assert desk is not None
    return {name: count for name, count in desk.counts.outcomes.items() if count}


def role_of(of: Room) -> str:
    """Of the engine that works now."""
    connection, _ = of.upstream()
    busy = [each for each in of.endpoints if each.num_in_flight]
    assert connection.listener is not None
    return busy[0].role.value


def status_of(wire: Wire) -> int:
    return int(wire.written[9:12])


def test_a_hand_off_from_end_to_end() -> None:
    """Prefill, then decode, then nothing is left."""
    here = room()
    client, wire = here.client()
    client.data_received(request(PROMPT))
    assert role_of(here) == "prefill"
    here.upstream()[0].data_received(response(OFFERED))
    assert role_of(here) == "decode"
    assert OFFER in here.upstream()[1].written
    here.upstream()[0].data_received(STREAM + b"9\r\n" + EVENT + b"\r\n0\r\n\r\n")

    assert split(bytes(wire.written))[1].endswith(EVENT + b"\r\n0\r\n\r\n")
    assert outcomes(here) == {"handed_off": 1}
    assert here.num_in_flight == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (len(OFFERED), OFFERED),
        b"HTTP/1.1 103 Early\r\nlink: a\r\n\r\n" + response(OFFERED),
    ],
)
def test_offers_come_in_any_framing(answer: bytes) -> None:
    """In chunks, behind an interim response, in pieces."""
    here = room()
    client, _ = here.client()
    client.data_received(request(PROMPT))
    upstream, _ = here.upstream()
    for idx in range(0, len(answer), 7):
        upstream.data_received(answer[idx : idx + 7])

    assert role_of(here) == "decode"
    assert OFFER in here.upstream()[1].written


@pytest.mark.parametrize(
    "answer",
    [
        response(b'{"kv_transfer_params":null}'),
        response(b'{"kv_transfer_params":{"do_remote_prefill":false}}'),
        response(b"[]"),
        response(b"\xff"),
        response(b""),
        response(b'{"x":"' + b"x" * (5 << 20) + b'"}'),
        response(b"{}", line="HTTP/1.1 302 Found"),
        b"nonsense\r\n\r\n",
        STREAM + b"9\r\n" + EVENT + b"\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_offer_is_an_error(answer: bytes) -> None:
    """The client is told; nothing of the answer gets to it."""
    here = room(prefill_attempts=1)
    client, wire = here.client()
    client.data_received(request(PROMPT))
    here.upstream()[0].data_received(answer)

    assert status_of(wire) == 502
    assert json.loads(split(bytes(wire.written))[1])["error"]["type"] == "upstream_error"
    assert outcomes(here) == {"failed": 1}
    assert here.num_in_flight == 0


def test_a_body_too_large_to_gather_goes_to_decode_in_pieces() -> None:
    """It can't be edited; the decode engine gets it as it comes, and the header says why."""
    here = room(relay={"gathered_bytes_max": 1024})
    body = PROMPT + b" " * 4096
    sent = request(body)
    client, wire = here.client()
    client.data_received(sent[:2000])
    upstream, upstream_wire = here.upstream()
    role = role_of(here)
    client.data_received(sent[2000:])
    upstream.data_received(response())

    assert role == "decode"
    assert split(bytes(upstream_wire.written))[1] == body
    assert b"; skipped=size\r\n" in wire.written


def test_parameters_of_clients_go_to_decode_where_they_are_allowed() -> None:
    """As they came; no prefill engine is asked."""
    here = room(client_params="decode_alone")
    body = b'{"prompt":"a","kv_transfer_params":{"cartridge_id": "c"}}'
    client, wire = here.client()
    client.data_received(request(body))
    upstream, upstream_wire = here.upstream()
    role = role_of(here)
    upstream.data_received(response())

    assert role == "decode"
    assert split(bytes(upstream_wire.written))[1] == body
    assert b"; skipped=client_params\r\n" in wire.written


def test_without_a_retry_budget_the_first_failure_counts() -> None:
    """The second prefill engine is not asked, and the client hears what the first one did."""
    here = room(limits={"retry_share": 0, "retry_min_per_s": 0, "retry_burst": 1})
    answers = []
    for _ in range(2):
        client, wire = here.client()
        client.data_received(request(PROMPT))
        here.upstream()[0].data_received(response(line="HTTP/1.1 500 No"))
        answers.append((wire, here.num_in_flight))
        client.connection_lost(None)

    assert answers[0][1] == 1, "the budget has one retry"
    assert (status_of(answers[1][0]), b"answered 500" in answers[1][0].written) == (502, True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (response(OFFERED), (1, 0, 0)),
        (response(line="HTTP/1.1 400 Wrong"), (1, 0, 0)),
        (response(line="HTTP/1.1 500 No"), (0, 1, 0)),
        (None, (0, 0, 1)),
    ],
)
def test_clients_are_counted_and_prefills_are_not(
    answer: bytes | None, expected: tuple[int, int, int]
) -> None:
    """The totals say what the client got, also where it was over before the decode engine's leg."""
    here = room()
    client, _ = here.client()
    client.data_received(request(PROMPT))
    if answer is None:
        client.connection_lost(None)
    while busy := list(here.busy()):
        if role_of(here) == "prefill":
            assert answer is not None
            busy[0][0].data_received(answer)
        else:
            busy[0][0].data_received(response())
    total = here.parts.router.total

    assert (total.num_done, total.num_failed, total.num_left) == expected


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("said", "told"), [(["Retry-After: 9"], b"9"), ([], b"1"), (["Retry-After: soon"], b"1")]
)
def test_busy_engines_say_when_to_come_again(leg: str, said: list[str], told: bytes) -> None:
    """Where a client gets 503, it is told what the engine said, or one second."""
    here = room(fallback="none")
    client, wire = here.client()
    client.data_received(request(PROMPT))
    while list(here.busy()):
        is_busy = role_of(here) == leg
        busy = response(b"busy", *said, line="HTTP/1.1 503 Busy")
        here.upstream()[0].data_received(busy if is_busy else response(OFFERED))

    assert status_of(wire) == 503
    assert b"\r\nRetry-After: " + told + b"\r\n" in wire.written


@pytest.mark.parametrize(("leg", "num_sent"), [("prefill", 2), ("decode", 1)])
def test_each_leg_has_its_time(leg: str, num_sent: int) -> None:
    """An engine that says nothing is given up; only a prefill is sent to another one."""
    here = room()
    client, wire = here.client()
    client.data_received(request(PROMPT))
    if leg == "decode":
        here.upstream()[0].data_received(response(OFFERED))
    first, first_wire = here.upstream()
    here.clock.at_s += LEG_S + 1
    here.relay.look()
    assert first.listener is None
    assert first_wire.was_aborted
    for _ in range(num_sent - 1):
        here.clock.at_s += LEG_S + 1
        here.relay.look()

    assert status_of(wire) == 504
    assert outcomes(here) == {"failed": 1}
    assert here.num_in_flight == 0


def test_the_end_of_the_router_is_told() -> None:
    """Before the response 503, in a stream of events an error."""
    here = room()
    computed, computed_wire = here.client()
    computed.data_received(request(PROMPT))
    prefill, _ = here.upstream()
    here.relay.drain()
    computed.stop("the router stops")

    there = room()
    streamed, streamed_wire = there.client()
    streamed.data_received(request(PROMPT))
    there.upstream()[0].data_received(response(OFFERED))
    there.upstream()[0].data_received(STREAM + b"9\r\n" + EVENT + b"\r\n")
    streamed.stop("the router stops")

    assert prefill.listener is None
    assert status_of(computed_wire) == 503
    assert b"the router stops" in streamed_wire.written
    assert (outcomes(here), outcomes(there)) == ({"failed": 1}, {"failed": 1})


class Unreachable(EndpointPool):
    """Takes no connection."""

    async def open(self) -> UpstreamConnection:
        raise ConnectionRefusedError


async def test_an_offer_that_no_engine_may_fetch_is_released_by_another() -> None:
    """It goes with a request that is sure to be refused, and is done when that was refused."""
    here = room(idle=0, decode_attempts=1)
    *prefills, unreachable, other = here.endpoints

    def make_pool(endpoint: Endpoint, timeout_s: float) -> EndpointPool:
        return (Unreachable if endpoint is unreachable else EndpointPool)(endpoint, timeout_s)

    here.relay.make_pool = make_pool
    for endpoint in (*prefills, other):
        here.connect(here.relay.pool_of(endpoint))
    # The least loaded is chosen.
    other.num_in_flight += 1
    client, wire = here.client()
    client.data_received(request(PROMPT, "Authorization: Bearer k"))
    here.upstream()[0].data_received(response(OFFERED))
    await asyncio.gather(*here.relay.connecting, return_exceptions=True)
    await asyncio.sleep(0)
    release, release_wire = here.upstream()
    head, body = split(bytes(release_wire.written))
    release.data_received(response(line="HTTP/1.1 404 Not Found"))
    desk = here.parts.handoffs
    assert desk is not None

    assert status_of(wire) == 502
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer k" in head
    assert json.loads(body)["kv_transfer_params"] == json.loads(OFFER)
    assert (desk.counts.num_released, desk.counts.num_unreleased) == (1, 0)
    assert other.num_in_flight == 1
