"""``kvkeep route --prefill … --decode …`` between real sockets: what engines and clients see."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.handing_fleet import (
    HASTY,
    PATH,
    PROMPT,
    TIMEOUT_S,
    Fleet,
    asked,
    bodies_of,
    first_of_all,
    fleet,
    is_one_set,
    note_of,
    question,
)
from tests.integration.offering_engine import (
    OFFER,
    TICKET,
    Behaviour,
    Handler,
    begin_stream,
    die,
    freeze,
    offer,
    refuse,
    stall,
)
from tests.integration.routers import wait_for, workers
from tests.waiting import HANG_S

Both = tuple[Fleet, Fleet]
"""One that waits as long as it takes, and one that does not wait for who freezes."""


@pytest.fixture(scope="module")
def both_strict() -> Iterator[Both]:
    with fleet() as patient, fleet(**HASTY) as hasty:
        yield patient, hasty


@pytest.fixture(scope="module")
def both_lenient() -> Iterator[Both]:
    lenient: dict[str, Any] = {"fallback": "decode_alone", "prefill_attempts": 1}
    with fleet(**lenient) as patient, fleet(**lenient, **HASTY) as hasty:
        yield patient, hasty


def _suited(request: pytest.FixtureRequest, both: Both) -> Iterator[Fleet]:
    call = getattr(request.node, "callspec", None)
    found = both[call is not None and call.params.get("behaviour") is freeze]
    yield found
    for engine in found.engines:
        engine.forget()


@pytest.fixture
def strict(request: pytest.FixtureRequest, both_strict: Both) -> Iterator[Fleet]:
    """A fleet that answers with an error where a hand-off fails."""
    yield from _suited(request, both_strict)


@pytest.fixture
def lenient(request: pytest.FixtureRequest, both_lenient: Both) -> Iterator[Fleet]:
    """A fleet that falls back."""
    yield from _suited(request, both_lenient)


# ---- the main path


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_prompt_goes_to_prefill_and_its_offer_to_decode(strict: Fleet, is_stream: bool) -> None:
    """Prefill computes one token, decode gets the request with the offer as it was written."""
    more = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
    answer = asked(strict, question(min_tokens=2, **more))
    (prefilled,) = bodies_of(strict.prefills)
    (decoded,) = [body for engine in strict.decodes for body in engine.bodies]
    ids = {each["X-Request-Id"] for engine in strict.engines for each in engine.headers}

    assert answer.status_code == 200
    assert answer.text == (
        'data: {"n": 1}\n\ndata: [DONE]\n\n'
        if is_stream
        else '{"id":"d","usage":{"prompt_tokens":7,"completion_tokens":2}}'
    )
    assert prefilled == {
        "model": "m",
        "prompt": PROMPT,
        "max_tokens": 1,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }
    original = json.dumps(question(min_tokens=2, **more)).encode()
    assert decoded == original[:-1] + b',"kv_transfer_params":' + OFFER + b"}"
    assert len(ids) == 1
    assert note_of(answer).startswith("prefill=127.0.0.1:")
    assert note_of(answer).endswith(" transport=nixl")


def test_odd_bodies_go_through_byte_by_byte(strict: Fleet) -> None:
    """Doubled keys, big numbers, escapes and spaces stay; the client's id is both legs' id."""
    odd = (
        b' {"prompt" : "' + PROMPT.encode() + b'\\u00e9" , "x":1e400,"x" :12345678901234567890123,'
        b'"max\\u005ftokens":7 ,"max_completion_tokens": 9, "kv_transfer_params":null } '
    )
    answer = asked(strict, odd, "/v1/chat/completions?a=b", **{"X-Request-Id": "mine"})
    (prefilled,) = [body for engine in strict.prefills for body in engine.bodies]
    (decoded,) = [body for engine in strict.decodes for body in engine.bodies]
    params = json.loads(prefilled)["kv_transfer_params"]

    assert answer.status_code == 200
    assert decoded == odd.replace(b"null", OFFER)
    raw = json.dumps(params, separators=(",", ":")).encode()
    changed = odd.replace(b":7 ", b":1 ").replace(b": 9,", b": 1,").replace(b"null", raw)
    assert prefilled == changed
    assert {each["X-Request-Id"] for e in strict.engines for each in e.headers} == {"mine"}


def test_legs_spread_over_the_engines_of_their_role(strict: Fleet) -> None:
    """With two of each, all four work."""
    for _ in range(4):
        assert asked(strict, question()).status_code == 200

    assert [len(engine.bodies) for engine in strict.prefills] == [2, 2]
    assert all(engine.bodies for engine in strict.decodes)


# ---- what is not handed off


@pytest.mark.parametrize(
    ("more", "path", "reason"),
    [
        ({"prompt": "short"}, PATH, "short"),
        ({"prompt": [PROMPT, PROMPT]}, PATH, "batch"),
        ({"prompt": [[1] * 200, [2] * 200]}, PATH, "batch"),
        ({"n": 2}, PATH, "samples"),
        ({"use_beam_search": True}, PATH, "samples"),
        ({"echo": True, "max_tokens": 0}, PATH, "prompt"),
        ({"prompt_logprobs": 0}, PATH, "prompt"),
        ({"prompt": [1] * 60}, PATH, "short"),
        ({}, "/v1/embeddings", "path"),
    ],
)
def test_what_one_pair_can_t_do_goes_to_decode_as_it_is(
    strict: Fleet, more: dict[str, Any], path: str, reason: str
) -> None:
    """The decode engine gets the bytes that came; header and counter say why."""
    before = strict.told()["skips"][reason]
    answer = asked(strict, question(**more), path)
    bodies = [body for engine in strict.decodes for body in engine.bodies]

    assert note_of(answer) == f"skipped={reason}"
    assert bodies == [json.dumps(question(**more)).encode()]
    assert bodies_of(strict.prefills) == []
    assert strict.told()["skips"][reason] == before + 1


def test_what_a_decode_engine_has_is_not_prefilled_elsewhere() -> None:
    """With a prefix-aware policy for decode, the second turn of a conversation stays there."""
    with fleet(decode_policy="prefix_aware") as found:
        first = asked(found, question())
        again = asked(found, question(prompt=PROMPT + "and more"))
        other = asked(found, question(prompt="different " + PROMPT))

    assert note_of(first).startswith("prefill=")
    assert note_of(again) == "skipped=warm"
    assert (
        again.headers["x-kvkeep-route"].split(";")[0]
        == (first.headers["x-kvkeep-route"].split(";")[0])
    )
    assert note_of(other).startswith("prefill=")


@pytest.mark.parametrize(
    "body",
    [
        question(kv_transfer_params={"do_remote_prefill": True}),
        b'{"prompt": "a", "kv_transfer_params": {}, "kv_transfer_params": {"x": 1}}',
        b'{"prompt": ',
        b"[]",
        b"",
    ],
)
def test_wrong_bodies_are_refused(strict: Fleet, body: bytes | dict[str, Any]) -> None:
    """400 with a sentence; no engine hears of it."""
    answer = asked(strict, body)

    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert bodies_of(strict.engines) == []


# ---- the prefill engine fails


@pytest.mark.parametrize("behaviour", [refuse(500), refuse(503), die, freeze, refuse(200, b"{}")])
def test_a_second_prefill_engine_takes_over(strict: Fleet, behaviour: Behaviour) -> None:
    """Whatever the first one does but answer, the client gets the second one's work."""
    first_of_all(strict.prefills, behaviour)
    answer = asked(strict, question())

    assert answer.status_code == 200
    assert [len(engine.bodies) for engine in strict.prefills] == [1, 1]
    assert len(bodies_of(strict.decodes)) == 1
    assert note_of(answer).startswith("prefill=")


@pytest.mark.parametrize(
    ("behaviour", "status", "kind"),
    [
        (refuse(500), 502, "upstream_error"),
        (refuse(503), 503, "overloaded_error"),
        (die, 502, "upstream_error"),
        (freeze, 504, "upstream_timeout"),
        (refuse(200, b"{}"), 502, "upstream_error"),
    ],
)
def test_without_any_prefill_the_client_is_told(
    strict: Fleet, behaviour: Behaviour, status: int, kind: str
) -> None:
    """A typed error, counted; no decode engine is asked."""
    before = strict.told()
    for engine in strict.prefills:
        engine.scripts.append(behaviour)
    answer = asked(strict, question())

    assert answer.status_code == status
    assert answer.json()["error"]["type"] == kind
    assert "hand-off" in answer.headers["x-kvkeep-route"]
    assert bodies_of(strict.decodes) == []
    strict.settled("failed", before)


def test_what_prefill_says_is_wrong_is_passed_on(strict: Fleet) -> None:
    """A 4xx is the client's, as the engine wrote it; nobody else is asked."""
    before = strict.told()
    first_of_all(strict.prefills, refuse(422, b'{"error": {"message":"no such thing"}}'))
    answer = asked(strict, question())

    assert (answer.status_code, answer.text) == (422, '{"error": {"message":"no such thing"}}')
    assert len(bodies_of(strict.engines)) == 1
    strict.settled("refused", before)


@pytest.mark.parametrize(
    ("behaviour", "label"),
    [
        (refuse(500), "prefill_error"),
        (refuse(503), "prefill_busy"),
        (die, "prefill_broken"),
        (freeze, "prefill_timeout"),
        (refuse(200, b"{}"), "prefill_no_offer"),
    ],
)
def test_a_fallback_is_counted_and_shown(lenient: Fleet, behaviour: Behaviour, label: str) -> None:
    """The decode engine gets the request as it came; header and counter say why."""
    before = lenient.told()
    first_of_all(lenient.prefills, behaviour)
    answer = asked(lenient, question())
    (decoded,) = [body for engine in lenient.decodes for body in engine.bodies]

    assert answer.status_code == 200
    assert note_of(answer) == f"fallback={label}"
    assert decoded == json.dumps(question()).encode()
    lenient.settled("fell_back", before)
    assert lenient.told()["fallbacks"][label] - before["fallbacks"].get(label, 0) == 1


# ---- the decode engine fails


def test_a_busy_decode_engine_costs_the_offer(strict: Fleet) -> None:
    """It may have freed the blocks when it refused: they are computed again for the next one."""
    first_of_all(strict.decodes, refuse(503))
    answer = asked(strict, question())

    assert answer.status_code == 200
    assert len(bodies_of(strict.prefills)) == 2
    assert [len(engine.bodies) for engine in strict.decodes] == [1, 1]


@pytest.mark.parametrize(("behaviour", "status"), [(die, 502), (freeze, 504)])
def test_what_may_have_killed_one_decode_engine_is_not_sent_to_the_next(
    strict: Fleet, behaviour: Behaviour, status: int
) -> None:
    """A typed error, and the offer is left to its lease: who looks dead may be reading."""
    before = strict.told()
    first_of_all(strict.decodes, behaviour)
    answer = asked(strict, question())

    assert answer.status_code == status
    assert len(bodies_of(strict.decodes)) == 1
    strict.settled("failed", before)
    assert strict.told()["released"] == before["released"]


@pytest.mark.parametrize("behaviour", [die, freeze, refuse(503)])
def test_decode_falls_back_to_another_engine(lenient: Fleet, behaviour: Behaviour) -> None:
    """Where that is wanted, the next decode engine computes the prompt itself."""
    before = lenient.told()
    first_of_all(lenient.decodes, behaviour)
    answer = asked(lenient, question())

    assert answer.status_code == 200
    assert note_of(answer).startswith("fallback=decode_")
    assert "kv_transfer_params" not in bodies_of(lenient.decodes)[-1] or (
        "kv_transfer_params" not in bodies_of(lenient.decodes)[0]
    )
    lenient.settled("fell_back", before)


def test_a_stream_that_stops_ends_in_an_error(lenient: Fleet) -> None:
    """After the first byte nothing falls back: an error event, and a broken hand-off."""
    before = lenient.told()

    def begin_and_die(handler: Handler, body: dict[str, Any]) -> None:
        begin_stream(handler)
        die(handler, body)

    first_of_all(lenient.decodes, begin_and_die)
    answer = asked(lenient, question(stream=True))
    last = json.loads(answer.text.split("data: ")[-1])

    assert answer.status_code == 200
    assert last["error"]["type"] == "upstream_error"
    assert len(bodies_of(lenient.decodes)) == 1
    lenient.settled("failed", before)


def test_an_offer_nobody_fetches_is_released() -> None:
    """No decode engine takes the connection: the router tries to give the blocks up, and counts."""
    with fleet(is_probed=False) as found:
        for engine in found.decodes:
            engine.shutdown()
            engine.socket.close()
        answer = asked(found, question())
        wait_for(found.process, lambda told: told["handoff"]["unreleased"] == 1)
        told = found.told()

    assert answer.status_code == 502
    assert (told["released"], told["unreleased"]) == (1, 1)


# ---- the client leaves


@pytest.mark.parametrize("where", ["prefill", "decode", "stream"])
def test_a_client_that_leaves_takes_its_engine_along(strict: Fleet, where: str) -> None:
    """Whoever works on the request sees its connection end; nothing stays in flight."""
    before = strict.told()
    role = strict.prefills if where == "prefill" else strict.decodes
    first_of_all(role, stall if where == "stream" else freeze)
    body = json.dumps(question(stream=True)).encode()
    parts = httpx.URL(strict.url)
    assert parts.port is not None
    with socket.create_connection((parts.host, parts.port), timeout=TIMEOUT_S) as sock:
        head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        if where == "stream":
            assert sock.recv(12) == b"HTTP/1.1 200"
        assert is_one_set(engine.begun for engine in role)

    assert is_one_set(engine.left for engine in role)
    strict.settled("aborted", before)


# ---- the router itself


def test_a_hand_off_in_progress_survives_a_drain() -> None:
    """After SIGTERM a prompt that is being computed is still answered; the process then ends."""

    def held(handler: Handler, body: dict[str, Any]) -> None:
        handler.server.begun.set()
        handler.server.go_on.wait(TIMEOUT_S)
        offer(OFFER)(handler, body)

    with fleet(prefill_timeout_s=TIMEOUT_S) as found:
        for engine in found.prefills:
            engine.scripts.append(held)
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(asked(found, question())))
        thread.start()
        assert is_one_set(engine.begun for engine in found.prefills)
        found.process.terminate()
        with httpx.Client(trust_env=False, timeout=HANG_S) as client:
            while client.get(f"{found.url}/health").status_code != 503:
                pass
        for engine in found.prefills:
            engine.go_on.set()
        thread.join()
        code = found.process.process.wait(TIMEOUT_S)

    assert answers[0].status_code == 200
    assert note_of(answers[0]).startswith("prefill=")
    assert code == 0


def test_health_asks_for_both_roles() -> None:
    """Without a prefill engine that is ready, a load balancer is sent elsewhere."""
    with fleet() as found:
        with httpx.Client(trust_env=False, timeout=HANG_S) as client:
            before = client.get(f"{found.url}/health").status_code
            for engine in found.prefills:
                url = f"{found.process.ready['admin_url']}/workers/{engine.name}"
                assert client.patch(url, json={"drain": True}).status_code == 200
            after = client.get(f"{found.url}/health").status_code
        answer = asked(found, question())

    assert (before, after) == (200, 503)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def test_it_is_counted_shown_and_explained(lenient: Fleet) -> None:
    """/metrics, /workers and /explain speak of hand-offs; totals are those of the client."""
    before = workers(lenient.process)
    for _ in range(3):
        assert asked(lenient, question()).status_code == 200
    done = before["total"]["requests_done"] + 3
    told = wait_for(lenient.process, lambda told: told["total"]["requests_done"] >= done)
    admin = lenient.process.ready["admin_url"]
    with httpx.Client(trust_env=False, timeout=HANG_S) as client:
        text = client.get(f"{admin}/metrics").text
        explained = client.post(f"{admin}/explain?path={PATH}", json=question()).json()
        short = client.post(f"{admin}/explain?path={PATH}", json={"prompt": "a"}).json()

    assert told["total"]["requests_done"] == done
    assert told["handoff"]["seconds"]["prefill_sent"] > 0
    assert 'kvkeep_router_handoffs_total{outcome="handed_off",transport="nixl"}' in text
    assert 'kvkeep_router_handoff_seconds_total{state="prefill_sent"}' in text
    assert explained["handoff"]["plan"] == "hand_off"
    assert explained["handoff"]["prefill"] in [engine.name for engine in lenient.prefills]
    assert short["handoff"] == {"plan": "short", "prefill": None}
    assert explained["endpoint"] in [engine.name for engine in lenient.decodes]


def test_a_pool_ticket_is_passed_on() -> None:
    """The other transport: the decode engine gets the ticket and what to do with it."""
    with fleet(transport="pool") as found:
        for engine in found.prefills:
            engine.behaviour = offer(TICKET)
        whole = asked(found, question())
        (asked_prefill,) = bodies_of(found.prefills)
        (decoded,) = [body for engine in found.decodes for body in engine.bodies]
        for engine in found.prefills:
            engine.behaviour = offer(b'{"kvkeep":{"ticket":"","tokens":0}}')
        empty = asked(found, question())
        outcomes = found.told()["outcomes"]

    assert asked_prefill["kv_transfer_params"] == {"kvkeep": {"hand_off": "prefill"}}
    assert note_of(whole).endswith("transport=pool")
    assert decoded.endswith(
        b',"kv_transfer_params":{"kvkeep":{"ticket": "t-1",  "tokens": 96,"hand_off":"decode"}}}'
    )
    assert note_of(empty).endswith("transport=pool empty")
    assert (outcomes["handed_off"], outcomes["empty"]) == (1, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prefill", "http://127.0.0.1:1"],
        ["--decode", "http://127.0.0.1:1", "--transport", "nixl"],
        ["http://127.0.0.1:1", "--transport", "nixl"],
        ["http://127.0.0.1:3", "--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"],
    ],
)
def test_half_a_pair_does_not_start(arguments: list[str]) -> None:
    """Without both roles, or with engines of none, one sentence and exit code 2."""
    command = [sys.executable, "-m", "kvkeep", "route", *arguments, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    assert done.returncode == 2
    assert "--prefill URL and --decode URL" in done.stderr
