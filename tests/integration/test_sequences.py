"""Sequences at real daemons: what comes back is what was put, whole, at the one that owns it."""

import concurrent.futures
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import pytest
import xxhash

from kvkeep.client.sequences import SequenceClient
from kvkeep.daemon.sequences.program import CONNECTIONS_MAX
from kvkeep.model.errors import CapacityError, RefusedError, UnavailableError
from kvkeep.protocol.tensors import DTYPES
from tests.integration.daemons import Daemon, connect, running_daemon, wait_until
from tests.integration.sequences import (
    KEY_TEXT,
    Layers,
    body_of,
    client_of,
    counted,
    head_of,
    joined,
    layers,
    raw_connection,
    read_answer,
    running_listener,
    status_of,
    tensor,
)

MIB = 1 << 20
SMALL = {"bytes_max": 4 * MIB, "body_bytes_max": 2 * MIB, "transfer_bytes_max": 3 * MIB}


@pytest.fixture(scope="module")
def three() -> Iterator[Mapping[str, Daemon]]:
    """Three daemons that ask for a key."""
    with (
        running_listener(has_key=True) as one,
        running_listener(has_key=True) as two,
        running_listener(has_key=True) as third,
    ):
        yield {"one": one, "two": two, "three": third}


@pytest.fixture(scope="module")
def small() -> Iterator[Daemon]:
    """One daemon with little room, and no key."""
    with running_listener(**cast("Any", SMALL)) as daemon:
        yield daemon


@pytest.fixture(params=["one daemon", "three daemons"])
def client(
    request: pytest.FixtureRequest, small: Daemon, three: Mapping[str, Daemon]
) -> Iterator[SequenceClient]:
    """A client for which it must not matter how many daemons there are."""
    is_one = request.param == "one daemon"
    with client_of({"only": small}) if is_one else client_of(three, key=KEY_TEXT) as found:
        yield found


class TestContract:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_values_come_back_bit_by_bit(self, client: SequenceClient, dtype: str) -> None:
        """Of every dtype, NaNs and all."""
        made = layers(1, 7, 3, dtype)
        client.put("values", made)

        assert client.get("values") == made
        assert client.get("values", [2]) == {2: made[2]}

    def test_what_is_not_there_is_a_miss(self, client: SequenceClient) -> None:
        """No error, and a length of nothing."""
        client.put("some", layers(1, 2, 1))
        assert client.delete("none") is False
        assert client.get("none") is None
        assert client.lengths("none") is None
        assert client.length("none") == 0
        assert client.get("some", [0, 5]) is None

    def test_an_append_begins_or_goes_on(self, client: SequenceClient) -> None:
        """Tokens of every layer lie behind those before."""
        client.delete("grown")
        parts = [layers(seed, seed, 2) for seed in (1, 5, 2)]
        told = [client.append("grown", part).length for part in parts]

        assert told == [1, 6, 8]
        assert client.get("grown") == joined(*parts)

    def test_layers_are_independent(self, client: SequenceClient) -> None:
        """One is put or grows, and the others stay; the length is what all have."""
        made = layers(1, 4, 3)
        client.put("layered", made)
        more = {1: layers(2, 3, 2)[1]}
        other = {2: layers(3, 9, 3, "float16")[2]}
        client.append("layered", more)
        client.put_layers("layered", other)

        found = client.lengths("layered")
        assert found is not None
        assert (found.length, dict(found.layers)) == (4, {0: 4, 1: 7, 2: 9})
        assert client.get("layered") == {0: made[0], 1: joined({1: made[1]}, more)[1]} | other

    def test_a_put_leaves_nothing_of_before(self, client: SequenceClient) -> None:
        """Neither layers nor tokens, and another dtype is no matter."""
        client.put("again", layers(1, 9, 4))
        made = layers(2, 3, 1, "int8")
        client.put("again", made)

        assert client.get("again") == made

    def test_a_delete_is_once_and_for_all(self, client: SequenceClient) -> None:
        """Twice is no mistake."""
        client.put("short-lived", layers(1, 2))

        assert [client.delete("short-lived"), client.delete("short-lived")] == [True, False]
        assert client.get("short-lived") is None

    def test_an_append_of_another_kind_changes_nothing(self, client: SequenceClient) -> None:
        """Neither of another dtype, nor of other heads; not even in layers that would fit."""
        made = layers(1, 3)
        client.put("kind", made)
        wrong = (tensor(1, 1, "float16"), tensor(2, 1, "float16"))
        narrow = np.zeros((1, 1, 8), np.float32)
        for more in ({0: layers(2, 1)[0], 1: wrong}, {0: (narrow, narrow)}):
            with pytest.raises(RefusedError, match="append the same kind"):
                client.append("kind", more)

        assert client.get("kind") == made

    def test_concurrent_appends_are_not_lost(self, client: SequenceClient) -> None:
        """Each lands once and whole, in all layers at the same place."""
        client.delete("crowd")
        parts = [layers(100 + number, 3) for number in range(60)]
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(
                threads.map(lambda part: client.append("crowd", part, expected_length=None), parts)
            )

        found = client.get("crowd")
        assert found is not None
        where = [_rows_of(found, start, 3) for start in range(0, 180, 3)]
        assert Counter(where) == Counter(_rows_of(part, 0, 3) for part in parts)

    def test_of_two_appends_that_expect_one_length_one_lands(self, client: SequenceClient) -> None:
        """The other is told, and nothing of it is there."""
        client.delete("race")
        landed = 0
        for length in range(20):
            parts = [layers(2 * length + number, 1) for number in range(2)]
            with concurrent.futures.ThreadPoolExecutor(2) as threads:
                jobs = [
                    threads.submit(client.append, "race", part, expected_length=length)
                    for part in parts
                ]
            errors = [job.exception() for job in jobs]
            assert sorted(type(error).__name__ for error in errors) == ["NoneType", "RefusedError"]
            landed += 1

        assert client.length("race") == landed

    def test_a_reader_sees_one_version_whole(self, client: SequenceClient) -> None:
        """While others put, append and delete."""
        versions = [layers(seed, 40 + seed, 4) for seed in range(5)]
        grown = [joined(version, layers(99, 1, 4)) for version in versions]
        stop = threading.Event()

        def write() -> None:
            turn = 0
            while not stop.is_set():
                client.put("watched", versions[turn % 5])
                client.append("watched", layers(99, 1, 4), expected_length=40 + turn % 5)
                client.delete("watched")
                turn += 1

        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            job = threads.submit(write)
            seen = [client.get("watched") for _ in range(150)]
            stop.set()
            job.result()

        known = [None, *versions, *grown]
        assert all(found in known for found in seen)
        assert any(found is not None for found in seen)

    def test_any_calls_do_what_a_dict_would(self, client: SequenceClient) -> None:
        """Hundreds of them, over many names."""
        chance, model = random.Random(5), dict[str, Layers]()
        for number in range(24):
            client.delete(f"m{number}")
        for step in range(300):
            name, part = f"m{chance.randrange(24)}", layers(step, chance.randrange(1, 9))
            match chance.choice(["put", "append", "append", "get", "delete", "layer"]):
                case "put":
                    client.put(name, part)
                    model[name] = part
                case "append":
                    client.append(name, part)
                    model[name] = joined(model.get(name, {}), part)
                case "layer":
                    client.put_layers(name, {0: part[0]})
                    model[name] = model.get(name, {}) | {0: part[0]}
                case "delete":
                    assert client.delete(name) == (model.pop(name, None) is not None)
                case "get":
                    assert client.get(name) == model.get(name)

        assert {name: client.get(name) for name in model} == model


def _rows_of(found: Layers, start: int, num_tokens: int) -> tuple[bytes, ...]:
    return tuple(
        each.bits()[start : start + num_tokens].tobytes()
        for layer_idx in sorted(found)
        for each in found[layer_idx]
    )


class TestLocality:
    def test_each_sequence_lies_at_its_owner(self, three: Mapping[str, Daemon]) -> None:
        """The others never hear of it; another client, told otherwise, finds them all."""
        names = [f"local-{number}" for number in range(60)]
        before = {name: counted(daemon, "sequences_put") for name, daemon in three.items()}
        with client_of(three, key=KEY_TEXT) as client:
            for number, name in enumerate(names):
                client.put(name, layers(number, 1, 1))
            owners = Counter(client.owner(name) for name in names)

        assert owners == {
            name: counted(daemon, "sequences_put") - before[name] for name, daemon in three.items()
        }
        assert set(owners) == set(three)
        shuffled = dict(sorted(three.items()))
        with client_of(shuffled, key=KEY_TEXT) as other:
            for number, name in enumerate(names):
                assert other.get(name) == layers(number, 1, 1)
            assert all(count.share == 1.0 for count in other.locality.values())
            assert {name: count.num_reads for name, count in other.locality.items()} == owners

    def test_an_owner_that_is_away_is_not_replaced(self) -> None:
        """Its sequences are not to be had, all others are; it owns the same when it is back."""
        with running_listener() as one, running_listener() as two:
            daemons = {"one": one, "two": two}
            with client_of(daemons) as client:
                names = [f"n{number}" for number in range(20)]
                for name in names:
                    client.put(name, layers(1, 1))
                two.kill()
                found: dict[str, Layers | str | None] = {}
                for name in names:
                    try:
                        found[name] = client.get(name)
                    except UnavailableError:
                        found[name] = "away"
            assert found == {
                name: layers(1, 1) if client.owner(name) == "one" else "away" for name in names
            }
            two.start()
            with client_of(daemons) as again:
                assert [again.owner(name) for name in names] == [
                    client.owner(name) for name in names
                ]
                mine = [name for name in names if again.owner(name) == "two"]
                assert [again.get(name) for name in mine] == [None] * len(mine)
                again.put(mine[0], layers(2, 1))
                assert counted(two, "sequences") == 1

    def test_a_lost_sequence_does_not_begin_in_its_middle(self) -> None:
        """Its writer is told when the daemon was started anew, and then may begin again."""
        with running_listener() as daemon:
            with client_of({"one": daemon}) as client:
                client.put("chat", layers(1, 5))
            daemon.kill()
            daemon.start()
            client._peers["one"]._address = ("127.0.0.1", daemon.ready["sequences_port"])
            with pytest.raises(RefusedError, match="put it again"):
                client.append("chat", layers(2, 1))

            assert client.get("chat") is None
            assert client.append("chat", layers(2, 1)).length == 1
            client.close()


class TestBounds:
    def test_whole_sequences_make_room(self, small: Daemon) -> None:
        """What is left is whole, and what all take stays within its limit."""
        with client_of({"only": small}) as client:
            made = layers(1, 3000, 4)
            evicted = counted(small, "sequences_evicted")
            for number in range(30):
                client.put(f"big-{number}", made)
                assert counted(small, "sequence_bytes") <= SMALL["bytes_max"]
            found = [client.get(f"big-{number}") for number in range(30)]

        assert counted(small, "sequences_evicted") - evicted >= 20
        assert found[-1] == made
        assert found[0] is None
        assert all(each in (None, made) for each in found)

    def test_what_was_evicted_is_not_appended_to(self, small: Daemon) -> None:
        """By whoever it is; a put, or a beginning that is said to be one, is taken."""
        with client_of({"only": small}) as client, client_of({"only": small}) as other:
            client.put("old", layers(1, 3))
            for number in range(8):
                client.put(f"new-{number}", layers(1, 3000, 4))
            for each in (client, other):
                with pytest.raises(RefusedError, match="put it"):
                    each.append("old", layers(2, 1))
            assert client.get("old") is None

            assert other.append("old", layers(2, 1), expected_length=0).length == 1

    def test_a_body_too_long_is_refused(self, small: Daemon) -> None:
        """And an append that would make too long a sequence; nothing was changed."""
        with client_of({"only": small}) as client:
            with pytest.raises(CapacityError, match="send fewer tokens"):
                client.put("long", layers(1, 20_000, 2))
            half = layers(1, 9000, 2)
            client.put("long", half)
            with pytest.raises(CapacityError, match="one may take"):
                client.append("long", layers(2, 9000, 2))

            assert client.get("long") == half

    def test_too_much_at_once_is_told_to_come_back(self, small: Daemon) -> None:
        """And is let in when there is room again; nothing of what broke off stays."""
        body = body_of(layers(1, 14_000, 2))
        with raw_connection(small) as sock:
            sock.sendall(head_of("PUT", "/v1/sequences/slow", len(body)) + body[:MIB])
            wait_until(lambda: counted(small, "sequence_transfer_bytes") > 0, "it is coming")
            status, answer = status_of(small, head_of("PUT", "/v1/sequences/x", len(body)))
        wait_until(lambda: counted(small, "sequence_transfer_bytes") == 0, "it is let go")

        assert status == 429
        assert b"retry-after: 1" in answer.lower()
        with client_of({"only": small}) as client:
            assert client.get("slow") is None
            assert client.put("x", layers(1, 14_000, 2)).length == 14_000

    def test_a_body_that_does_not_come_is_given_up(self) -> None:
        """After as long as a request may take."""
        with running_listener(request_s_max=1.0) as hasty, raw_connection(hasty) as sock:
            sock.sendall(head_of("PUT", "/v1/sequences/never", 1000) + b"12345")
            status, _ = read_answer(sock)

            assert status == 408
            assert counted(hasty, "sequence_transfer_bytes") == 0

    def test_connections_are_counted_and_engines_are_not_kept_out(self, small: Daemon) -> None:
        """One too many is closed at once."""
        socks = []
        try:
            for _ in range(CONNECTIONS_MAX + 40):
                holder = raw_connection(small)
                socks.append((holder, holder.__enter__()))
            session = connect(small)
            session.close()
            statuses = []
            for _, sock in socks:
                try:
                    sock.sendall(head_of("GET", "/health"))
                    statuses.append(read_answer(sock)[0])
                except OSError:
                    statuses.append(0)
        finally:
            for holder, _ in socks:
                holder.__exit__(None, None, None)

        # Connections of earlier tests may still be ending.
        assert CONNECTIONS_MAX - 8 <= statuses.count(200) <= CONNECTIONS_MAX
        assert set(statuses) == {0, 200}
        wait_until(lambda: status_of(small, head_of("GET", "/health"))[0] == 200, "room again")


def test_no_listener_unless_it_is_asked_for() -> None:
    """A daemon without the section listens nowhere else, and says so."""
    with running_daemon() as daemon:
        assert daemon.ready["sequences_port"] is None
        assert daemon.status()["sequences"] is None
        assert b"kvkeep_sequences" not in daemon.get("/metrics")


def test_sequences_are_counted_and_no_engine_sees_them(small: Daemon) -> None:
    """They take no slot of the pool, and stand in the metrics."""
    before = daemon_counters(small)
    with client_of({"only": small}) as client:
        client.put("counted", layers(1, 2))
        client.get("counted")
        client.get("not-there")
        client.delete("counted")
    after = daemon_counters(small)

    moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert moved == {
        "sequences_put": 1,
        "sequences_read": 1,
        "sequences_missed": 1,
        "sequences_deleted": 1,
        "sequence_bytes_received": len(body_of(layers(1, 2))),
        "sequence_bytes_sent": 2 * 4 * 2 * 8 * 2,
    }
    assert b"kvkeep_sequences_put_total" in small.get("/metrics")


def daemon_counters(daemon: Daemon) -> dict[str, int]:
    """Those of sequences and all others."""
    status = daemon.status()
    found: dict[str, int] = status["counters"] | status["sequences"]["counters"]
    return found


def test_a_bit_that_changes_on_the_way_is_found(small: Daemon) -> None:
    """In both directions; nothing is kept of it, and nothing returned."""
    made, body = layers(1, 3), bytearray(body_of(layers(1, 3)))
    digest = xxhash.xxh3_128_hexdigest(body)
    with client_of({"only": small}) as client, raw_connection(small) as sock:
        client.put("way", made)
        sock.sendall(head_of("GET", "/v1/sequences/way"))
        status, answer = read_answer(sock)
        body[-1] ^= 1
        head = head_of("PUT", "/v1/sequences/way", len(body), f"X-Kvkeep-Digest: {digest}")

        assert (status, f"x-kvkeep-digest: {digest}".encode() in answer.lower()) == (200, True)
        assert status_of(small, head + body)[0] == 422
        assert client.get("way") == made


def test_a_port_in_use_is_refused_at_start(small: Daemon) -> None:
    """With one sentence and code 2, before a pool is made."""
    complaint = r"sequences\.port \d+ on 127\.0\.0\.1 can't be used"
    listener = running_listener(port=small.ready["sequences_port"])
    with pytest.raises(AssertionError, match=complaint), listener:
        pass


def test_a_daemon_ends_while_bodies_are_coming() -> None:
    """Soon, and with code 0."""
    with running_listener() as daemon, raw_connection(daemon) as sock:
        sock.sendall(head_of("PUT", "/v1/sequences/one", 1000) + b"12345")
        wait_until(lambda: counted(daemon, "sequence_transfer_bytes") > 0, "it is coming")

        assert daemon.stop() == 0
