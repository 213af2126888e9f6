"""A request that names a cartridge, from its bytes to those that an engine gets."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkeep.cartridges.registry import Registry
from kvkeep.router.cartridges.desk import CartridgeDesk
from kvkeep.router.relay.framing import parse_request
from kvkeep.router.relay.reader import Request
from kvkeep.router.request import RequestView
from kvkeep.router.snapshot import Endpoint
from tests.unit.cartridges.made import contents, draft
from tests.unit.router.relay.wires import Room, Wire, request, response

SALTS = "kvkeep-cartridge:"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a cartridge on ships and one on whales."""
    folder = tmp_path_factory.mktemp("library")
    with Registry(folder) as registry:
        for seed, name in enumerate(("ships", "whales")):
            registry.register_contents(draft(name, labels={"topic": name}), contents(seed=seed))
    return folder


class Fleet(Room):
    """Engines behind a router that knows cartridges."""

    def __init__(self, library: Path, *, num_endpoints: int = 1, **section: Any) -> None:
        told = {"library": str(library), **section}
        super().__init__(num_endpoints=num_endpoints, cartridges=told)
        found = self.parts.cartridges
        assert found is not None
        self.desk: CartridgeDesk = found

    def ask(self, body: bytes, *fields: str, line: str = "POST /v1/completions HTTP/1.1") -> Wire:
        """A client's request; returns its end of the connection."""
        client, wire = self.client()
        client.data_received(request(body, *fields, line=line))
        return wire

    def forwarded(self) -> bytes:
        """What the one engine that is asked got."""
        return bytes(self.upstream()[1].written)

    def body(self) -> bytes:
        """Its body, or that of the last of several."""
        return self.forwarded().rpartition(b"\r\n\r\n")[2]

    def close(self) -> None:
        self.desk.close()


@pytest.fixture
def fleet(library: Path) -> Iterator[Fleet]:
    """One engine, ids in requests."""
    room = Fleet(library)
    yield room
    room.close()


def status_of(wire: Wire) -> int:
    return int(wire.written[9:12])


def error_of(wire: Wire) -> str:
    body = bytes(wire.written).partition(b"\r\n\r\n")[2]
    message: str = json.loads(body)["error"]["message"]
    return message


def digest_of(fleet: Fleet, name: str) -> str:
    known = fleet.desk.catalogue.find(name)
    assert known is not None
    return known.digest


class TestWhatAnEngineGets:
    def test_a_request_that_names_none_is_not_touched(self, fleet: Fleet) -> None:
        """Byte by byte what the client sent, spaces and all."""
        body = b'{ "prompt" :"a" , "x":1.0e0,"x":2,"kv_transfer_params":{"other":1} }'
        fleet.ask(body)

        assert fleet.body() == body

    def test_a_named_cartridge_is_salted(self, fleet: Fleet) -> None:
        """All bytes stay, but for the transfer parameters and the salt behind."""
        body = b'{ "prompt" :"a" ,"kv_transfer_params" : { "cartridge_id":"ships","other":1.0e0 } }'
        fleet.ask(body)

        salt = SALTS + digest_of(fleet, "ships")
        assert fleet.body() == (
            b'{ "prompt" :"a" ,"kv_transfer_params" : { "cartridge_id":"ships","other":1.0e0 } '
            b',"cache_salt":"%b"}' % salt.encode()
        )

    def test_extra_body_in_raw_json_is_honoured(self, fleet: Fleet) -> None:
        """The engine, which does not know that spelling, is told in its own."""
        body = {"prompt": "a", "extra_body": {"kv_transfer_params": {"cartridge_id": "ships",
                "cartridge_mode": "prepend"}}}  # fmt: skip
        fleet.ask(json.dumps(body).encode())

        got = json.loads(fleet.body())
        assert got["kv_transfer_params"] == {"cartridge_id": "ships", "cartridge_mode": "prepend"}
        assert got["cache_salt"] == SALTS + digest_of(fleet, "ships")
        assert got["extra_body"] == body["extra_body"]

    def test_what_a_request_has_already_stays(self, fleet: Fleet) -> None:
        """Behind another router nothing is left to do: not a byte changes."""
        salt = SALTS + digest_of(fleet, "ships")
        body = json.dumps(
            {"kv_transfer_params": {"cartridge_id": "ships"}, "cache_salt": salt, "prompt": "a"}
        ).encode()
        fleet.ask(body)

        assert fleet.body() == body

    def test_its_own_salt_still_counts(self, fleet: Fleet) -> None:
        """A tenant's salt keeps it apart also from others with the same cartridge."""
        body = {"prompt": "a", "cache_salt": "al\u00efce",
                "kv_transfer_params": {"cartridge_id": "ships"}}  # fmt: skip
        fleet.ask(json.dumps(body).encode())

        assert json.loads(fleet.body())["cache_salt"] == (
            f"{SALTS}{digest_of(fleet, 'ships')}:al\u00efce"
        )

    def test_two_cartridges_have_two_salts(self, fleet: Fleet) -> None:
        """With the same prompt the engine's own cache keeps them apart."""
        assert digest_of(fleet, "ships") != digest_of(fleet, "whales")

    def test_the_length_is_that_of_the_new_body(self, fleet: Fleet) -> None:
        """And there is one only; the client may have sent chunks."""
        body = b'{"prompt":"a","kv_transfer_params":{"cartridge_id":"ships"}}'
        client, _ = fleet.client()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
        client.data_received(head + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))

        forwarded = fleet.forwarded()
        assert forwarded.lower().count(b"content-length:") == 1
        assert b"transfer-encoding" not in forwarded.lower()
        assert b"content-length: %d\r\n" % len(fleet.body()) in forwarded.lower()

    @pytest.mark.parametrize("line", ["POST /v1/embeddings", "GET /v1/completions"])
    def test_other_requests_pass(self, fleet: Fleet, line: str) -> None:
        """What generates nothing has no use for a cartridge."""
        body = b'{"kv_transfer_params":{"cartridge_id":"nothing"}}'
        fleet.ask(body, line=f"{line} HTTP/1.1")

        assert fleet.body() == body


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "status", "said"),
        [
            ({"kv_transfer_params": {"cartridge_id": "bees"}}, 404, "there is no cartridge 'bees'"),
            ({"extra_body": {"kv_transfer_params": {"cartridge_id": "bees"}}}, 404, "'bees'"),
            ({"kv_transfer_params": {"cartridge_id": ["ships"]}}, 400, "must be one text"),
            ({"kv_transfer_params": {"cartridge_id": ""}}, 400, "cartridge_id is empty"),
            (
                {"kv_transfer_params": {"cartridge_id": "ships"}, "cache_salt": SALTS + "00"},
                400,
                "leave it out",
            ),
            (
                {"kv_transfer_params": {"cartridge_id": "ships"}, "cache_salt": 7},
                400,
                "cache_salt must be a text",
            ),
            (
                {"vllm_xargs": {"cartridge_id": "ships"}, "kv_transfer_params": [1]},
                400,
                "kv_transfer_params must be an object",
            ),
        ],
    )
    def test_no_engine_is_asked(
        self, fleet: Fleet, body: dict[str, Any], status: int, said: str
    ) -> None:
        """One sentence in OpenAI's form; the connection stays."""
        wire = fleet.ask(json.dumps(body).encode())

        assert (status_of(wire), list(fleet.busy())) == (status, [])
        assert said in error_of(wire)
        assert wire.is_open
        assert fleet.num_in_flight == 0

    def test_a_body_that_is_no_json_is_refused(self, fleet: Fleet) -> None:
        """It might name a cartridge for whoever reads it more kindly."""
        wire = fleet.ask(b'{"prompt": NaN}')

        assert status_of(wire) == 400
        assert "JSON object" in error_of(wire)

    def test_what_was_found_is_counted(self, fleet: Fleet) -> None:
        """Each request once, by what became of it."""
        for name in ("ships", "whales", "bees"):
            fleet.ask(json.dumps({"kv_transfer_params": {"cartridge_id": name}}).encode())
        fleet.ask(b"[]")
        fleet.ask(b"{}")

        assert fleet.desk.counts == {"chosen": 2, "unknown": 1, "refused": 1, "unread": 0}

    def test_where_that_is_configured_the_unknown_is_computed(self, library: Path) -> None:
        """As it came, and the response says so."""
        room = Fleet(library, unknown="compute")
        body = b'{"kv_transfer_params":{"cartridge_id":"bees"}}'
        wire = room.ask(body)
        assert room.body() == body
        room.upstream()[0].data_received(response())
        room.close()

        assert b"; cartridge=none unknown by cartridge_id\r\n" in wire.written
        assert room.desk.counts["unknown"] == 1


class TestOtherRules:
    def test_a_header_names_one(self, library: Path) -> None:
        """The body is told; what a browser's client can't write, a proxy can."""
        room = Fleet(library, router={"type": "header"})
        room.ask(b'{"prompt":"a"}', "X-Kvkeep-Cartridge: whales")
        got = json.loads(room.body())
        room.close()

        assert got["kv_transfer_params"] == {"cartridge_id": "whales"}

    def test_a_label_names_one(self, library: Path) -> None:
        """By its value under a key of the request."""
        room = Fleet(library, router={"type": "label", "label_key": "topic", "extras_key": "topic"})
        room.ask(b'{"prompt":"a","kv_transfer_params":{"topic":"ships"}}')
        got = json.loads(room.body())
        refused = room.ask(b'{"kv_transfer_params":{"topic":"bees"}}')
        room.close()

        assert got["kv_transfer_params"] == {"topic": "ships", "cartridge_id": "ships"}
        assert (status_of(refused), error_of(refused)) == (
            404,
            "no cartridge has the label topic=bees: see kvkeep cartridge ls, and register one",
        )

    def test_a_default_is_for_who_names_none(self, library: Path) -> None:
        """Who names one gets that; who names one that is not there gets none."""
        rules = [{"type": "explicit"}, {"type": "static", "cartridge_id": "ships"}]
        room = Fleet(library, router={"type": "composite", "routers": rules})
        found = []
        for params in (b"null", b'{"cartridge_id":"whales"}'):
            room.ask(b'{"kv_transfer_params":%b}' % params)
            found.append(json.loads(room.body())["kv_transfer_params"]["cartridge_id"])
            room.upstream()[0].data_received(response())
        refused = room.ask(b'{"kv_transfer_params":{"cartridge_id":"bees"}}')
        room.close()

        assert found == ["ships", "whales"]
        assert status_of(refused) == 404

    def test_a_default_that_is_not_there_is_unavailable(self, library: Path) -> None:
        """It is nobody's mistake who asks."""
        room = Fleet(library, router={"type": "static", "cartridge_id": "bees"})
        wire = room.ask(b"{}")
        room.close()

        assert status_of(wire) == 503
        assert b"Retry-After" in wire.written

    @pytest.mark.parametrize(
        ("rule", "status"), [({"type": "explicit"}, 200), ({"type": "header"}, 413)]
    )
    def test_a_body_too_large_to_be_edited(
        self, library: Path, rule: dict[str, str], status: int
    ) -> None:
        """It passes, and the response says that it was not read; with a cartridge it can't."""
        desk = Fleet(library, router=rule)
        desk.relay.settings = type(desk.relay.settings)(gathered_bytes_max=1024)
        client, wire = desk.client()
        body = b'{"prompt":"%b"}' % (b"x" * 4096)
        client.data_received(request(body, "X-Kvkeep-Cartridge: ships")[:3000])
        if status == 200:
            desk.upstream()[0].data_received(response())
        desk.close()

        assert status_of(wire) == status
        assert (desk.desk.counts["unread"], desk.desk.counts["refused"]) == (
            (1, 0) if status == 200 else (0, 1)
        )
        assert (b"; cartridge=unread\r\n" in wire.written) is (status == 200)


class TestWhereItGoes:
    @pytest.fixture
    def three(self, library: Path) -> Iterator[Fleet]:
        """Three engines, of which the last has ships in memory."""
        room = Fleet(library, num_endpoints=3)
        for endpoint in room.endpoints:
            room.desk.holders.tell(endpoint.name, frozenset())
        room.desk.holders.tell(room.endpoints[2].name, frozenset({"ships"}))
        yield room
        room.close()

    def asked_of(self, room: Fleet, name: str) -> tuple[Endpoint, str]:
        """Which engine is asked for a cartridge, and what the response's header says."""
        wire = room.ask(b'{"kv_transfer_params":{"cartridge_id":"%b"}}' % name.encode())
        (busy,) = (each for each in room.endpoints if each.num_in_flight)
        room.upstream()[0].data_received(response())
        line = next(
            line for line in bytes(wire.written).split(b"\r\n") if b"X-Kvkeep-Route" in line
        )
        return busy, line.decode()

    def test_where_it_is_resident(self, three: Fleet) -> None:
        """Each time, though engines take turns otherwise; the header says why."""
        for _ in range(4):
            busy, line = self.asked_of(three, "ships")
            assert busy is three.endpoints[2]
            assert line.endswith(", cartridge resident; cartridge=ships by cartridge_id")
        assert three.desk.holders.counts["resident"] == 4

    def test_elsewhere_if_it_is_resident_nowhere(self, three: Fleet) -> None:
        """Engines take turns as always."""
        found = [self.asked_of(three, "whales") for _ in range(3)]

        assert {busy.name for busy, _ in found} == {each.name for each in three.endpoints}
        assert all("cartridge nowhere" in line for _, line in found)

    def test_elsewhere_if_its_engine_is_gone(self, three: Fleet) -> None:
        """A request is not refused for the sake of a load."""
        three.parts.fleet.leave(three.endpoints[2].name)
        busy, line = self.asked_of(three, "ships")

        assert busy is not three.endpoints[2]
        assert "cartridge nowhere" in line

    def test_a_request_without_one_goes_anywhere(self, three: Fleet) -> None:
        """Where cartridges lie is nothing to it."""
        asked = []
        for _ in range(3):
            three.ask(b"{}")
            asked.append(next(each.name for each in three.endpoints if each.num_in_flight))
            three.upstream()[0].data_received(response())

        assert len(set(asked)) == 3

    def test_explaining_counts_nothing(self, three: Fleet) -> None:
        """It says where a request would go."""
        body = b'{"kv_transfer_params":{"cartridge_id":"ships"}}'
        head = parse_request(request(body).partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        view = RequestView("/v1/completions")
        three.desk.explain(Request(head, body, is_whole=True), view)
        choice = three.parts.router.route(view, 0.0, explain=True)

        assert choice.endpoint is three.endpoints[2]
        assert not any(three.desk.counts.values())
        assert not any(three.desk.holders.counts.values())


def test_every_body_comes_back_but_for_two_members(fleet: Fleet) -> None:
    """Escapes, numbers and duplicates of others pass as they are written."""
    body = (
        '{"a":"\\u00e9\\/","b":[1E2,-0.0,{"c":"}"}],"a":null,'
        '"kv_transfer_params":{"cartridge_id":"s\\u0068ips","n":1E2},"cache_salt":"mine","z":"é"}'
    ).encode()
    fleet.ask(body)
    got = fleet.body()

    assert got.startswith(body.partition(b'"kv_transfer_params"')[0])
    assert got.endswith('"z":"é"}'.encode())
    assert b'"n":1E2' in got
    assert json.loads(got)["kv_transfer_params"]["cartridge_id"] == "ships"
