"""Whatever a prefill engine answers, the client gets a response, and nothing stays in flight."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.router.handoff.test_serving import OFFERED, PROMPT, role_of, room
from tests.unit.router.relay.wires import chunked, request, response

STATUSES = st.sampled_from([100, 103, 200, 204, 302, 400, 404, 429, 500, 502, 503, 999])
LINES = st.builds("HTTP/1.1 {} X".format, STATUSES)
BODIES = st.sampled_from([OFFERED, b"{}", b"[", b'{"kv_transfer_params":[]}', b"\xff", b""])
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Responses, some of them damaged, some with more behind them."""
    body = draw(BODIES)
    whole = draw(
        st.sampled_from([CHUNKED + chunked([body[:9], body[9:]])])
        | LINES.map(lambda line: response(body, line=line))
        | st.binary(max_size=60)
    )
    cut = draw(st.integers(0, len(whole)) | st.just(len(whole)))
    flipped = draw(st.none() | st.integers(0, max(0, cut - 1)))
    damaged = bytearray(whole[:cut])
    if flipped is not None and damaged:
        damaged[flipped] ^= draw(st.integers(1, 255))
    return bytes(damaged) + draw(st.sampled_from([b"", b"", b"HTTP/1.1 200 OK\r\n\r\n"]))


@settings(deadline=None)
@given(answers(), st.integers(1, 50), st.booleans())
@example(response(OFFERED), 7, False)
@example(b"HTTP/1.1 204 No\r\n\r\n", 50, False)
def test_any_answer_leads_somewhere(answer: bytes, step: int, is_reused: bool) -> None:
    """To a decode engine, to an error, or to what the engine says is wrong; never to silence."""
    here = room(prefill_attempts=1)
    client, wire = here.client()
    client.data_received(request(PROMPT))
    connection, _ = here.upstream()
    # What crossed the end of a kept connection is sent again, for which this has no network.
    connection.is_reused = is_reused and bool(answer)
    for idx in range(0, len(answer), step):
        if connection.listener is not None:
            connection.data_received(answer[idx : idx + step])
    if connection.listener is not None:
        connection.connection_lost(None)
    if here.num_in_flight:
        assert role_of(here) == "decode"
        assert not wire.written
        client.connection_lost(None)
    else:
        assert wire.written.startswith(b"HTTP/1.1 ")
        assert int(wire.written[9:12]) >= 400

    assert here.num_in_flight == 0
    assert not here.parts.gate.num_running
