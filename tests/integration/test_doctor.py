"""``kvkeep doctor`` and real servers: what works, what is away, and what a daemon says of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvkeep.cli.main import main
from tests.integration.daemons import Daemon, Worker, hashes_of, running_daemon, wait_until
from tests.integration.test_movement import store_sequence, wait_for_tiers
from tests.servers.tier_server import S3_ENVIRONMENT, SERVER_KINDS, tier_server

BACK_TIMEOUT_S = 90.0


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def write_config(folder: Path, tier: dict[str, object], socket: str = "") -> Path:
    """Settings of a daemon with this tier; calls to it end soon."""
    file = folder / "daemon.yaml"
    told = {
        "socket": socket or str(folder / "d.sock"),
        "pool": str(folder / "pool"),
        "pool_bytes": 1 << 24,
        "tiers": [tier | ({} if tier["kind"] == "disk" else {"timeout_s": 4.0, "deadline_s": 8.0})],
    }
    file.write_text(json.dumps(told))
    return file


def report(config: Path, kind: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the line about the tier."""
    done = CliRunner().invoke(main, ["doctor", "--json", "--config", str(config)])
    found = {each["what"]: each for each in json.loads(done.stdout)["findings"]}
    return done.exit_code, found[kind]


@pytest.mark.parametrize("kind", SERVER_KINDS)
def test_a_server_is_tried(kind: str, tmp_path: Path) -> None:
    """Its speed while it is there; what to do when it is away."""
    with tier_server(kind) as server:
        config = write_config(tmp_path, server.tier)
        code, there = report(config, kind)
        server.kill()
        code_away, away = report(config, kind)

    assert (code, there["level"]) == (0, "ok")
    assert "reads" in there["text"]
    assert "writes" in there["text"]
    assert (code_away, away["level"]) == (1, "fail")
    assert away["mend"] == "start what should answer there, or take the tier out"


def test_a_mooncake_store_without_memory_is_a_warning(tmp_path: Path) -> None:
    """As before the daemons that lend it theirs are up; the line says who could."""
    with tier_server("mooncake", num_storages=0) as server:
        code, found = report(write_config(tmp_path, server.tier), "mooncake")

    assert (code, found["level"]) == (0, "warn")
    assert "segment_bytes" in found["mend"]


@pytest.mark.parametrize("removed", ["*", "segment-*"])
def test_a_folder_that_was_removed_under_a_daemon_fails(removed: str, tmp_path: Path) -> None:
    """The daemon serves what it has open; the doctor sees that nobody else will."""
    folder = tmp_path / "disk"
    tier: dict[str, object] = {"kind": "disk", "folder": str(folder), "capacity_bytes": "64MiB"}
    config = write_config(tmp_path, tier)
    with running_daemon(config=config) as daemon, Worker(daemon) as worker:
        write_config(tmp_path, tier, daemon.socket)
        store_sequence(daemon, worker, hashes_of(0, 4))
        code, there = report(config, "disk")
        for path in folder.glob(removed):
            path.unlink()
        code_removed, away = report(config, "disk")

    assert (code, there["level"]) == (0, "ok")
    assert (code_removed, away["level"]) == (1, "fail")
    assert "removed" in away["text"]


@pytest.mark.parametrize("kind", SERVER_KINDS)
def test_a_daemon_is_asked_about_its_server(kind: str, tmp_path: Path) -> None:
    """Open, left alone once calls to a killed one fail, and open again when it is back."""
    with tier_server(kind) as server:
        config = write_config(tmp_path, server.tier)
        with running_daemon(config=config) as daemon, Worker(daemon) as worker:
            write_config(tmp_path, server.tier, daemon.socket)
            wait_for_tiers(daemon)
            wait_until(lambda: is_found(daemon, worker, config, kind, "ok"), "ok", BACK_TIMEOUT_S)
            server.kill()
            wait_until(
                lambda: is_found(daemon, worker, config, kind, "fail"), "fail", BACK_TIMEOUT_S
            )
            server.start_again()
            wait_until(lambda: is_found(daemon, worker, config, kind, "ok"), "ok", BACK_TIMEOUT_S)


def is_found(daemon: Daemon, worker: Worker, config: Path, kind: str, level: str) -> bool:
    """Store something, so that the tier is used, and see whether the doctor finds this."""
    worker.store(hashes_of(10 * daemon.counter("blocks_stored") + 1, 4))
    code, found = report(config, kind)
    assert code == (found["level"] == "fail")
    said = ("left alone", "has not answered yet")  # Mooncake's client takes a second to start
    assert found["level"] != "fail" or any(text in found["text"] for text in said)
    return bool(found["level"] == level)
