"""``kvkeep cache`` against real daemons above a disk and above real servers.

What it shows is what is there, clear means gone, and what a server can't tell is said.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.main import main
from kvkeep.client.prefixes import PrefixClient
from kvkeep.daemon.movement.opening import open_medium
from kvkeep.daemon.settings import load_settings
from kvkeep.model.ids import BlockHash, BlockKey
from kvkeep.tiers.entry_names import HEAD_BYTES
from kvkeep.tiers.mooncake.tier import MooncakeTier
from tests.integration.daemons import (
    NAMESPACE,
    Daemon,
    Vandal,
    Worker,
    acquire,
    hashes_of,
    opened_prefixes,
    payload_of,
    running_daemon,
    wait_until,
)
from tests.integration.test_movement import serve, wait_for_tiers
from tests.servers.processes import START_TIMEOUT_S
from tests.servers.tier_server import S3_ENVIRONMENT, SERVER_KINDS, tier_server

NUM_BLOCKS = 40
KEEP_TIMEOUT_S = 60.0
PATIENCE_S = 5.0
VALUE_BYTES_MAX = 1 << 20
HEADED = ("valkey", "object_store")
"""Tiers whose values stand behind a head on their server."""

_numbers = itertools.count()


@pytest.fixture(scope="module", params=["disk", *SERVER_KINDS])
def medium(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """What daemons are told of a disk, or of a server that runs."""
    with contextlib.ExitStack() as ends:
        environment = ends.enter_context(pytest.MonkeyPatch.context())
        for name, value in S3_ENVIRONMENT.items():
            environment.setenv(name, value)
        if request.param == "disk":
            yield {"kind": "disk", "capacity_bytes": "1GiB"}
        else:
            yield ends.enter_context(tier_server(request.param)).tier


@pytest.fixture
def config(medium: dict[str, object], tmp_path: Path) -> Path:
    """A daemon's settings with a place in this medium that is its own."""
    own: dict[str, object] = {"prefix": f"test/{next(_numbers)}/"}
    if medium["kind"] == "disk":
        own = {"folder": str(tmp_path / "disk")}
    file = tmp_path / "daemon.yaml"
    file.write_text(json.dumps({"tiers": [medium | own], "planner": "load"}))
    return file


@pytest.fixture
def daemon(config: Path) -> Iterator[Daemon]:
    """A daemon above it."""
    with running_daemon(config=config) as daemon:
        yield daemon


def name_of(medium: dict[str, object]) -> str:
    """What a command calls the tier."""
    return str(medium["kind"])


def run(daemon: Daemon, *arguments: str) -> Result:
    """The command as a user types it."""
    return CliRunner().invoke(main, ["cache", *arguments, "--socket", daemon.socket])


def answer(daemon: Daemon, *arguments: str) -> Any:
    """What it prints for a machine."""
    done = run(daemon, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def rows(daemon: Daemon) -> dict[str, Any]:
    """``cache stat`` by tier."""
    return {row["tier"]: row for row in answer(daemon, "stat")["tiers"]}


def keep(daemon: Daemon, worker: Worker, client: PrefixClient) -> list[BlockHash]:
    """Store a sequence, and use it until the tier, which may come up late, has all of it."""
    hashes = hashes_of(0, NUM_BLOCKS)
    wait_for_tiers(daemon)
    worker.store(hashes)

    def is_kept() -> bool:
        assert serve(worker, client, hashes) == NUM_BLOCKS
        return daemon.counter("blocks_cascaded") >= NUM_BLOCKS

    wait_until(is_kept, "blocks cascaded", KEEP_TIMEOUT_S)
    return hashes


def keys_of(listed: dict[str, Any]) -> set[str]:
    """The hashes of a listing."""
    return {key["block_hash"] for key in listed["keys"]}


def test_what_is_stored_is_counted_and_listed(medium: dict[str, object], daemon: Daemon) -> None:
    """Pool and tier hold the same blocks; keys come with a limit and by namespace."""
    tier = name_of(medium)
    with Worker(daemon) as worker, opened_prefixes(daemon, patience_s=PATIENCE_S) as client:
        hashes = keep(daemon, worker, client)
        found = rows(daemon)
        listed = {
            name: answer(daemon, "ls", "--tier", name, "--limit", "4096") for name in ("pool", tier)
        }
        exactly = run(daemon, "ls", "--tier", tier, "--limit", str(NUM_BLOCKS))
        few = answer(daemon, "ls", "--limit", "3", "--namespace", NAMESPACE.hex())
        none = answer(daemon, "ls", "--tier", tier, "--namespace", "00" * 32)
        shown = run(daemon, "stat").stdout

        assert found["pool"]["num_blocks"] == NUM_BLOCKS
        assert found[tier]["num_blocks"] == (NUM_BLOCKS if tier == "disk" else None)
        assert ("only the server knows" in shown) == (tier != "disk")
        assert tier in shown
        for name, keys in listed.items():
            assert keys_of(keys) == {block_hash.hex() for block_hash in hashes}
            assert keys["is_whole"] == keys["can_list"] == (name != "mooncake")
        assert (len(few["keys"]), few["is_whole"], few["has_more"]) == (3, False, True)
        assert none["keys"] == []
        assert "there are more than" not in exactly.stderr
        assert len(exactly.stdout.splitlines()) == NUM_BLOCKS


def test_another_daemon_lists_what_it_did_not_write(
    medium: dict[str, object], daemon: Daemon
) -> None:
    """Started anew without its pool; a tier without a list says so in a sentence, and is served."""
    tier = name_of(medium)
    with Worker(daemon) as worker, opened_prefixes(daemon, patience_s=PATIENCE_S) as client:
        hashes = keep(daemon, worker, client)
    assert daemon.stop() == 0
    daemon.pool.unlink()
    daemon.start()
    with Worker(daemon) as worker, opened_prefixes(daemon, patience_s=PATIENCE_S) as client:
        wait_for_tiers(daemon)
        listing = run(daemon, "ls", "--tier", tier)
        verified = run(daemon, "verify", "--tier", tier)
        listed, checked = listing.stdout.splitlines(), verified.stdout
        wait_until(
            lambda: serve(worker, client, hashes) == NUM_BLOCKS, "served by it", KEEP_TIMEOUT_S
        )

        assert (listing.exit_code, verified.exit_code) == (0, 0)
        assert len(listed) == (0 if tier == "mooncake" else NUM_BLOCKS)
        assert ("mooncake can't list its keys" in listing.stderr) == (tier == "mooncake")
        assert ("it can't list its keys" in checked) == (tier == "mooncake")
        assert checked.startswith(f"{tier}: {len(listed)} right")


def test_rot_is_found_and_removed(medium: dict[str, object], config: Path, daemon: Daemon) -> None:
    """A flipped bit in the pool and one in the tier: each found once, then gone."""
    tier = name_of(medium)
    with (
        Worker(daemon) as worker,
        opened_prefixes(daemon, patience_s=PATIENCE_S) as client,
    ):
        hashes = keep(daemon, worker, client)
        lease = acquire(client, hashes)
        assert lease is not None
        client.release([lease])
        vandal = Vandal(worker.view)
        vandal.flip(vandal.payload(lease.slots[7]), 12345)
        if tier == "disk":
            rot_on_disk(config.parent / "disk", hashes[3])
        else:
            rot_on_server(config, hashes[3])
        done = run(daemon, "verify", "--json")
        again = run(daemon, "verify")

        assert done.exit_code == 1
        for found in json.loads(done.stdout)["tiers"]:
            assert found["num_checked"] == NUM_BLOCKS
            assert (found["num_right"], found["num_rotten"]) == (NUM_BLOCKS - 1, 1)
        assert again.exit_code == 0
        assert f"{tier}: {NUM_BLOCKS - 1} right, 0 rotten" in again.stdout


def rot_on_disk(folder: Path, block_hash: BlockHash) -> None:
    """Flip a bit of this block in the files of the disk tier."""
    payload = payload_of(block_hash).tobytes()
    for path in folder.glob("segment-*"):
        at = path.read_bytes().find(payload)
        if at >= 0:
            with path.open("r+b") as opened:
                opened.seek(at + 2048)
                opened.write(bytes([payload[2048] ^ 1]))
            return
    raise AssertionError("the block is in no segment")


def rot_on_server(config: Path, block_hash: BlockHash) -> None:
    """Write this block's value again with a bit flipped, past the daemon and all its checks."""
    (settings,) = load_settings(config, {}, {}).tiers
    tier = open_medium(settings, VALUE_BYTES_MAX)
    try:
        assert not isinstance(tier, MooncakeTier) or tier.wait_ready(START_TIMEOUT_S)
        keys, room = [BlockKey(NAMESPACE, block_hash)], bytearray(VALUE_BYTES_MAX)
        (length,) = tier.read(keys, [[memoryview(room)]])
        assert length is not None
        room[length // 2] ^= 1
        tier.delete(keys)
        assert tier.write(keys, [[memoryview(room)[:length]]]) == [True]
    finally:
        tier.close()


@pytest.mark.parametrize("medium", HEADED, indirect=True)
def test_a_damaged_head_on_a_server_is_found_and_removed(
    medium: dict[str, object],
    config: Path,
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A value that stands behind no head of its own is rot as well: counted once, then gone."""
    tier = name_of(medium)
    with Worker(daemon) as worker, opened_prefixes(daemon, patience_s=PATIENCE_S) as client:
        hashes = keep(daemon, worker, client)
        with monkeypatch.context() as patch:
            # Only what this process writes: the daemon is another one.
            patch.setattr(f"kvkeep.tiers.{tier}.pack_head", lambda _name, _bytes: bytes(HEAD_BYTES))
            (settings,) = load_settings(config, {}, {}).tiers
            with contextlib.closing(open_medium(settings, VALUE_BYTES_MAX)) as bare:
                assert bare.write([BlockKey(NAMESPACE, hashes[3])], [[memoryview(b"x")]]) == [True]
        done = run(daemon, "verify", "--tier", tier, "--json")
        again = run(daemon, "verify", "--tier", tier)

        assert done.exit_code == 1
        (found,) = json.loads(done.stdout)["tiers"]
        assert (found["num_right"], found["num_rotten"]) == (NUM_BLOCKS - 1, 1)
        assert again.exit_code == 0
        assert f"{tier}: {NUM_BLOCKS - 1} right, 0 rotten" in again.stdout
        (status,) = daemon.status()["movement"]["tiers"]
        assert status["rejected"]["damaged_head"] == 1


def test_cleared_blocks_do_not_come_back(medium: dict[str, object], daemon: Daemon) -> None:
    """After clearing all tiers nothing is found, and a restart finds nothing either."""
    tier = name_of(medium)
    with Worker(daemon) as worker, opened_prefixes(daemon, patience_s=PATIENCE_S) as client:
        hashes = keep(daemon, worker, client)
        refused = run(daemon, "clear")
        cleared = answer(daemon, "clear", "--yes")["tiers"]
        found = rows(daemon)

        assert refused.exit_code == 2
        assert f"this clears pool, {tier}: repeat it with --yes" in refused.stderr
        assert [(each["tier"], each["num_cleared"], each["can_list"]) for each in cleared] == [
            (tier, NUM_BLOCKS, tier != "mooncake"),
            ("pool", NUM_BLOCKS, True),
        ]
        assert found["pool"]["num_blocks"] == 0
        assert not found[tier]["num_blocks"]
        assert acquire(client, hashes) is None
    assert daemon.stop() == 0
    daemon.start()
    with Worker(daemon), opened_prefixes(daemon, patience_s=PATIENCE_S) as client:
        wait_for_tiers(daemon)
        assert acquire(client, hashes) is None


def test_one_tier_can_be_cleared_alone(medium: dict[str, object], daemon: Daemon) -> None:
    """The pool is emptied but for what is lent; the tier keeps its blocks and serves them."""
    with Worker(daemon) as worker, opened_prefixes(daemon, patience_s=PATIENCE_S) as client:
        hashes = keep(daemon, worker, client)
        lease = acquire(client, hashes[:4])
        assert lease is not None
        (cleared,) = answer(daemon, "clear", "--tier", "pool")["tiers"]
        client.release([lease])
        left = answer(daemon, "ls", "--tier", name_of(medium))

        assert cleared["num_cleared"] == NUM_BLOCKS - 4
        assert cleared["num_kept"] == 4
        assert len(left["keys"]) == NUM_BLOCKS
        wait_until(
            lambda: serve(worker, client, hashes) == NUM_BLOCKS, "served by it", KEEP_TIMEOUT_S
        )


@pytest.mark.parametrize("medium", ["disk"], indirect=True)
def test_bad_input_is_one_sentence(daemon: Daemon) -> None:
    """A tier that is not there, a namespace that is none, a limit out of range."""
    done = [
        run(daemon, "verify", "--tier", "tape"),
        run(daemon, "ls", "--namespace", "xyz"),
        run(daemon, "ls", "--limit", "0"),
        run(daemon, "clear", "--tier", "tape"),
    ]

    assert [(each.exit_code, each.stderr.count("\n")) for each in done] == [(2, 1)] * 4
    assert "choose from pool" in done[0].stderr


def test_a_tier_that_can_t_be_looked_at_is_named(tmp_path: Path) -> None:
    """Before an engine has come, and where its folder can't be used: never passed over in silence.

    Who names the tiers that are meant is not told of others.
    """
    (tmp_path / "file").write_text("no folder")
    tiers = [
        {"kind": "disk", "folder": str(tmp_path / name), "capacity_bytes": "64MiB", "name": name}
        for name in ("good", "file")
    ]
    config = tmp_path / "daemon.yaml"
    config.write_text(json.dumps({"tiers": tiers}))
    with running_daemon(config=config) as daemon:
        waiting = [run(daemon, "verify"), run(daemon, "clear", "--yes", "--json")]
        with Worker(daemon):
            wait_for_tiers(daemon)
            failed = [run(daemon, "verify"), run(daemon, "clear", "--yes", "--json")]
            named = run(daemon, "clear", "--tier", "pool", "--tier", "good")

    assert [each.exit_code for each in (*waiting, *failed)] == [1] * 4
    assert all("good: not " in each.stderr and "file: not " in each.stderr for each in waiting)
    assert all("good: not " not in each.stderr for each in failed)
    assert all("file: not " in each.stderr for each in failed)
    assert list(json.loads(failed[1].stdout)["left_out"]) == ["file"]
    assert [each["tier"] for each in json.loads(failed[1].stdout)["tiers"]] == ["good", "pool"]
    assert named.exit_code == 0


@pytest.mark.parametrize("what", ["verify", "clear"])
def test_a_tier_whose_server_died_keeps_no_other_from_being_seen_to(
    what: str, tmp_path: Path
) -> None:
    """It is named with what it did; who names it alone gets the sentence and code 2."""
    disk = {"kind": "disk", "folder": str(tmp_path / "disk"), "capacity_bytes": "64MiB"}
    config = tmp_path / "daemon.yaml"
    with tier_server("valkey") as server:
        config.write_text(json.dumps({"tiers": [server.tier, disk], "planner": "load"}))
        with running_daemon(config=config) as daemon, Worker(daemon) as worker:
            wait_for_tiers(daemon)
            worker.store(hashes_of(0, 4))
            wait_until(lambda: daemon.counter("blocks_cascaded") >= 8, "blocks in both")
            server.kill()
            asked = {"verify": [], "clear": ["--yes"]}[what]
            every = run(daemon, what, *asked, "--json")
            one = run(daemon, what, "--tier", "valkey")
            found = rows(daemon)

    assert (every.exit_code, one.exit_code) == (1, 2)
    seen_to = [each["tier"] for each in json.loads(every.stdout)["tiers"]]
    assert sorted(seen_to) == ["disk", "pool"]
    assert list(json.loads(every.stdout)["left_out"]) == ["valkey"]
    assert f"valkey: not {'verified' if what == 'verify' else 'cleared'}" in every.stderr
    assert one.stderr.count("\n") == 1
    assert [found[tier]["num_blocks"] for tier in seen_to] == [4 if what == "verify" else 0] * 2
