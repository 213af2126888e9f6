"""``kvkeep cache`` against real daemons: what it shows is what is there, and clear means gone."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from kvkeep.cli.main import main
from kvkeep.model.ids import BlockHash
from tests.integration.daemons import (
    NAMESPACE,
    Daemon,
    Vandal,
    Worker,
    acquire,
    hashes_of,
    opened_prefixes,
    payload_of,
    wait_until,
)
from tests.integration.test_movement import daemon_with_disk, serve, store_sequence

NUM_BLOCKS = 40


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


def test_what_is_stored_is_counted_and_listed(tmp_path: Path) -> None:
    """Pool and disk hold the same blocks; keys come with a limit and by namespace."""
    hashes = hashes_of(0, NUM_BLOCKS)
    with daemon_with_disk(tmp_path) as daemon, Worker(daemon) as worker:
        store_sequence(daemon, worker, hashes)
        found = rows(daemon)
        listed = {
            tier: answer(daemon, "ls", "--tier", tier, "--limit", "4096")
            for tier in ("pool", "disk")
        }
        few = answer(daemon, "ls", "--limit", "3", "--namespace", NAMESPACE.hex())
        none = answer(daemon, "ls", "--tier", "disk", "--namespace", "00" * 32)

        assert found["pool"]["num_blocks"] == found["disk"]["num_blocks"] == NUM_BLOCKS
        assert found["disk"]["capacity_bytes"] > found["disk"]["used_bytes"] > 0
        assert found["disk"]["bytes_per_s"] > 0
        for keys in listed.values():
            assert {key["block_hash"] for key in keys["keys"]} == {h.hex() for h in hashes}
            assert keys["is_whole"]
        assert (len(few["keys"]), few["is_whole"]) == (3, False)
        assert none["keys"] == []
        assert "disk" in run(daemon, "stat").stdout


def test_rot_is_found_and_removed(tmp_path: Path) -> None:
    """A flipped bit in the pool and one on the disk: each found once, then gone."""
    hashes = hashes_of(0, NUM_BLOCKS)
    with daemon_with_disk(tmp_path) as daemon, Worker(daemon) as worker:
        store_sequence(daemon, worker, hashes)
        with opened_prefixes(daemon) as client:
            lease = acquire(client, hashes)
            assert lease is not None
            client.release([lease])
        vandal = Vandal(worker.view)
        vandal.flip(vandal.payload(lease.slots[7]), 12345)
        rot_one_value(tmp_path, hashes[3])
        done = run(daemon, "verify", "--json")
        again = run(daemon, "verify")

        assert done.exit_code == 1
        for found in json.loads(done.stdout)["tiers"]:
            assert found["num_checked"] == NUM_BLOCKS
            assert (found["num_right"], found["num_rotten"]) == (NUM_BLOCKS - 1, 1)
        assert again.exit_code == 0
        assert f"disk: {NUM_BLOCKS - 1} right, 0 rotten" in again.stdout


def rot_one_value(folder: Path, block_hash: BlockHash) -> None:
    """Flip a bit of this block in the files of the disk tier."""
    payload = payload_of(block_hash).tobytes()
    for path in (folder / "disk").glob("segment-*"):
        at = path.read_bytes().find(payload)
        if at >= 0:
            with path.open("r+b") as opened:
                opened.seek(at + 2048)
                opened.write(bytes([payload[2048] ^ 1]))
            return
    raise AssertionError("the block is in no segment")


def test_cleared_blocks_do_not_come_back(tmp_path: Path) -> None:
    """After clearing all tiers nothing is found, and a restart finds nothing either."""
    hashes = hashes_of(0, NUM_BLOCKS)
    with daemon_with_disk(tmp_path, planner="load") as daemon:
        with Worker(daemon) as worker, opened_prefixes(daemon) as client:
            store_sequence(daemon, worker, hashes)
            refused = run(daemon, "clear")
            cleared = answer(daemon, "clear", "--yes")["tiers"]
            found = rows(daemon)

            assert refused.exit_code == 2
            assert "this clears pool, disk: repeat it with --yes" in refused.stderr
            assert [(each["tier"], each["num_cleared"]) for each in cleared] == [
                ("disk", NUM_BLOCKS),
                ("pool", NUM_BLOCKS),
            ]
            assert found["pool"]["num_blocks"] == found["disk"]["num_blocks"] == 0
            assert acquire(client, hashes) is None
        daemon.stop()
        daemon.start()
        with Worker(daemon), opened_prefixes(daemon) as client:
            assert acquire(client, hashes) is None


def test_one_tier_can_be_cleared_alone(tmp_path: Path) -> None:
    """The pool is emptied but for what is lent; the disk keeps its blocks and serves them."""
    hashes = hashes_of(0, NUM_BLOCKS)
    with daemon_with_disk(tmp_path, planner="load") as daemon, Worker(daemon) as worker:
        store_sequence(daemon, worker, hashes)
        with opened_prefixes(daemon) as client:
            lease = acquire(client, hashes[:4])
            assert lease is not None
            (cleared,) = answer(daemon, "clear", "--tier", "pool")["tiers"]
            client.release([lease])

            assert cleared["num_cleared"] == NUM_BLOCKS - 4
            assert cleared["num_kept"] == 4
            assert rows(daemon)["disk"]["num_blocks"] == NUM_BLOCKS
            wait_until(lambda: serve(worker, client, hashes) == NUM_BLOCKS, "served by the disk")


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    """A tier that is not there, a namespace that is none, a limit out of range."""
    with daemon_with_disk(tmp_path) as daemon:
        done = [
            run(daemon, "verify", "--tier", "tape"),
            run(daemon, "ls", "--namespace", "xyz"),
            run(daemon, "ls", "--limit", "0"),
            run(daemon, "clear", "--tier", "tape"),
        ]

        assert [(each.exit_code, each.stderr.count("\n")) for each in done] == [(2, 1)] * 4
        assert "choose from pool" in done[0].stderr
