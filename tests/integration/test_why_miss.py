"""``kvkeep why-miss`` against a real daemon: each reason is brought about, then asked for."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from kvkeep.cli.main import main
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import BlockHash, Namespace
from kvkeep.protocol import messages as m
from kvkeep.protocol.codec import join_hashes
from kvkeep.protocol.versions import VERSION
from tests.integration.daemons import (
    CALL_TIMEOUT_S,
    LAYOUT,
    NAMESPACE,
    Daemon,
    Worker,
    connect,
    hashes_of,
    opened_prefixes,
    running_daemon,
    wait_until,
)
from tests.integration.test_movement import daemon_with, daemon_with_disk, store_sequence
from tests.servers.tier_server import tier_server


def why(daemon: Daemon, *arguments: str) -> Any:
    """What the command prints for a machine."""
    done = CliRunner().invoke(main, ["why-miss", *arguments, "--socket", daemon.socket, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def greeting(namespace: Namespace, dtype: str) -> m.Hello:
    """Of a scheduler that says what its blocks are."""
    parts = [
        m.IdentityPart("layout.block_tokens", str(LAYOUT.block_tokens)),
        m.IdentityPart("layout.dtype", dtype),
    ]
    return m.Hello(VERSION, "scheduler", f"engine-{dtype}", namespace=namespace, identity=parts)


def ask(daemon: Daemon, namespace: Namespace, hashes: list[BlockHash], name: str) -> int:
    """A scheduler's question for a request of this name; returns the blocks lent."""
    connection = connect(daemon, greeting(namespace, "bfloat16"))
    request = m.Acquire(1, namespace, 0, join_hashes(hashes), 30.0, 0, name)
    try:
        return len(connection.call(request, m.Acquired, CALL_TIMEOUT_S).slots) // 4
    finally:
        connection.close()


def test_every_reason_has_its_name() -> None:
    """Never stored, evicted, rotten, cleared; and what was lent before."""
    hashes = hashes_of(0, 8)
    with running_daemon() as daemon, Worker(daemon) as worker:
        assert ask(daemon, NAMESPACE, hashes, "cmpl-never") == 0
        worker.store(hashes[:4])
        assert ask(daemon, NAMESPACE, hashes, "cmpl-part") == 4
        worker.connection.send(m.ReportCorrupt(NAMESPACE, 0, hashes[3]))
        worker.connection.call(m.Ping(99), m.Pong, CALL_TIMEOUT_S)
        assert ask(daemon, NAMESPACE, hashes, "cmpl-rotten") == 3
        while worker.store(hashes_of(10_000 + daemon.counter("blocks_stored"), 250)):
            if daemon.counter("blocks_evicted") > 250:
                break
        assert ask(daemon, NAMESPACE, hashes, "cmpl-evicted") == 0
        CliRunner().invoke(main, ["cache", "clear", "--yes", "--socket", daemon.socket])
        last = hashes_of(10_000, 1)
        worker.store(last)
        CliRunner().invoke(main, ["cache", "clear", "--yes", "--socket", daemon.socket])
        ask(daemon, NAMESPACE, last, "cmpl-cleared")
        found = {each["engine_request"]: each for each in why(daemon)["requests"]}

        assert found["cmpl-never"]["reason"]["code"] == "never_stored"
        assert found["cmpl-part"]["num_lent"] == 4
        assert found["cmpl-part"]["first_missing"] == hashes[4].hex()
        assert found["cmpl-rotten"]["reason"]["code"] == "rotten"
        assert found["cmpl-evicted"]["reason"]["code"] == "evicted"
        assert "no tier below the pool" in found["cmpl-evicted"]["reason"]["text"]
        assert found["cmpl-cleared"]["reason"]["code"] == "cleared"
        (one,) = why(daemon, "part")["requests"]
        assert one["engine_request"] == "cmpl-part"
        assert "less than a block" in why(daemon, "cmpl-unknown")["advice"]


def test_engines_that_differ_are_compared() -> None:
    """Of two engines with one prompt, the second learns which field differs."""
    other = Namespace(b"o" * 32)
    hashes = hashes_of(0, 4)
    with running_daemon() as daemon, Worker(daemon) as worker:
        worker.store(hashes)
        connect(daemon, greeting(NAMESPACE, "bfloat16")).close()
        connection = connect(daemon, greeting(other, "float16"))
        request = m.Acquire(1, other, 0, join_hashes(hashes_of(100, 4)), 30.0, 0, "cmpl-other")
        connection.call(request, m.Acquired, CALL_TIMEOUT_S)
        connection.close()
        done = CliRunner().invoke(main, ["why-miss", "cmpl-other", "--socket", daemon.socket])

        assert "0 of 4 blocks lent" in done.stdout
        assert "holds 4 blocks and differs in" in done.stdout
        assert "layout.dtype: float16 here, bfloat16 there" in done.stdout


def test_a_prompt_is_hashed_as_its_engine_does(tmp_path: Path) -> None:
    """Token ids, with and without a salt, are found as far as they were stored."""
    ids = list(range(5 * LAYOUT.block_tokens + 3))
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    hashes = BlockHasher(NAMESPACE, LAYOUT.block_tokens).extend(ids)
    with running_daemon() as daemon, Worker(daemon) as worker:
        worker.store(list(hashes[:3]))
        connect(daemon, greeting(NAMESPACE, "bfloat16")).close()
        (found,) = why(daemon, "--tokens", str(tmp_path / "ids.json"))["prefixes"]
        (salted,) = why(daemon, "--tokens", str(tmp_path / "ids.json"), "--salt", "s")["prefixes"]
        nobodys = ["--tokens", str(tmp_path / "ids.json"), "--namespace", "00" * 32]
        refused = CliRunner().invoke(main, ["why-miss", *nobodys, "--socket", daemon.socket])

        assert refused.exit_code == 2
        assert f"choose one of {NAMESPACE.hex()}" in refused.stderr
        assert (found["num_ready"], found["num_blocks"]) == (3, 5)
        assert found["first_missing"] == hashes[3].hex()
        assert found["reason"]["code"] == "never_stored"
        assert salted["num_ready"] == 0


def test_a_block_that_stays_in_its_tier_is_named(tmp_path: Path) -> None:
    """With the planner pinned to computing, what the pool lost is on the disk and does not come."""
    ids = list(range(4 * LAYOUT.block_tokens + 1))
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    hashes = BlockHasher(NAMESPACE, LAYOUT.block_tokens).extend(ids)
    with daemon_with_disk(tmp_path, planner="recompute") as daemon, Worker(daemon) as worker:
        store_sequence(daemon, worker, list(hashes))
        connect(daemon, greeting(NAMESPACE, "bfloat16")).close()
        arguments = ["cache", "clear", "--tier", "pool", "--socket", daemon.socket]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        (found,) = why(daemon, "--tokens", str(tmp_path / "ids.json"))["prefixes"]

        assert found["reason"]["code"] == "in_tier"
        assert "in disk" in found["reason"]["text"]


def test_a_tier_that_does_not_answer_is_no_tier_that_has_the_block(tmp_path: Path) -> None:
    """Its server is killed: the reason names that, for blocks it had and for unknown ones."""
    hashes = hashes_of(0, 4)
    with (
        tier_server("valkey") as server,
        daemon_with(tmp_path, server.tier, planner="load") as daemon,
        Worker(daemon) as worker,
        opened_prefixes(daemon, patience_s=5.0) as client,
    ):
        store_sequence(daemon, worker, hashes)
        clear = ["cache", "clear", "--tier", "pool", "--socket", daemon.socket]
        assert CliRunner().invoke(main, clear).exit_code == 0
        server.kill()

        def reason(name: str, wanted: list[BlockHash]) -> dict[str, str]:
            question = client.ask(NAMESPACE, 0, wanted, engine_request=name)
            assert question is not None
            client.answer(question, CALL_TIMEOUT_S)
            (found, *_) = why(daemon, name)["requests"]
            return dict(found["reason"])

        silent = "valkey does not answer now"
        wait_until(lambda: silent in reason("cmpl-had", hashes)["text"], "left alone")
        had = reason("cmpl-had", hashes)
        unknown = reason("cmpl-unknown", hashes_of(500, 4))

        assert had["code"] != "in_tier"
        assert "nothing to load" not in had["text"]
        assert unknown["code"] == "never_stored"
        assert silent in unknown["text"]


def test_a_clear_that_was_refused_clears_nothing() -> None:
    """A block that is evicted later was evicted, whatever was asked and turned down before."""
    hashes = hashes_of(0, 4)
    with running_daemon() as daemon, Worker(daemon) as worker:
        worker.store(hashes)
        refused = ["cache", "clear", "--tier", "pool", "--tier", "nosuch"]
        done = CliRunner().invoke(main, [*refused, "--socket", daemon.socket])
        while worker.store(hashes_of(10_000 + daemon.counter("blocks_stored"), 250)):
            if daemon.counter("blocks_evicted") > 250:
                break
        ask(daemon, NAMESPACE, hashes, "cmpl-evicted")
        (found,) = why(daemon, "cmpl-evicted")["requests"]

        assert done.exit_code == 2
        assert found["reason"]["code"] == "evicted"
