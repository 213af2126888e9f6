"""The report as a whole, and how tiers without a daemon are tried."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from kvkeep.cli.doctor import asked_tier, make_plan, tried_tier
from kvkeep.cli.findings import Level
from kvkeep.cli.main import main
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.tier_settings import AnyTierSettings, DiskTierSettings, ObjectStoreTierSettings
from kvkeep.tiers.disk.tier import DiskTier

DISK = DiskTierSettings(folder="/tier", capacity_bytes=1 << 30)


def config(folder: Path, **settings: object) -> Path:
    """A settings file of a daemon that does not run."""
    file = folder / "daemon.yaml"
    told = {"socket": str(folder / "d.sock"), "pool": str(folder / "pool"), "pool_bytes": 1 << 24}
    file.write_text(json.dumps(told | settings))
    return file


def report(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and findings by what they are about."""
    done = CliRunner().invoke(main, ["doctor", "--json", *arguments])
    found = json.loads(done.stdout)["findings"]
    return done.exit_code, {each["what"]: each for each in found}


def test_a_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    """Its speed is measured in a folder that is gone afterwards; files of the tier stay."""
    folder = tmp_path / "tier"
    folder.mkdir()
    (folder / "headers.kvkeep").write_bytes(b"somebody's")
    (folder / "segment-0000.kvkeep").symlink_to("/nowhere")
    tier = {"kind": "disk", "folder": str(folder), "capacity_bytes": "64MiB"}
    code, found = report("--config", str(config(tmp_path, tiers=[tier])))

    assert code == 0
    assert found["disk"]["level"] == "ok"
    assert "reads" in found["disk"]["text"]
    assert "writes" in found["disk"]["text"]
    assert found["socket"]["level"] == "warn"
    assert sorted(os.listdir(folder)) == ["headers.kvkeep", "segment-0000.kvkeep"]
    assert (folder / "headers.kvkeep").read_bytes() == b"somebody's"


def test_a_disk_smaller_than_its_tier_is_a_warning(tmp_path: Path) -> None:
    """It would fill up before its capacity is used."""
    settings = DiskTierSettings(folder=str(tmp_path / "not" / "yet"), capacity_bytes=1 << 50)
    found = tried_tier(settings)

    assert found.level is Level.WARN
    assert "lower capacity_bytes" in found.mend
    assert list(tmp_path.iterdir()) == []


def test_what_can_t_be_opened_fails(tmp_path: Path) -> None:
    """Exit code 1, and the line says what to do."""
    (tmp_path / "file").write_text("no folder")
    tier = {"kind": "disk", "folder": str(tmp_path / "file"), "capacity_bytes": "64MiB"}
    code, found = report("--config", str(config(tmp_path, tiers=[tier])))

    assert code == 1
    assert found["disk"]["level"] == "fail"
    assert found["disk"]["mend"] == "choose another folder"
    assert tried_tier(ObjectStoreTierSettings(url="nonsense")).level is Level.FAIL


@pytest.mark.parametrize(
    ("movement", "level", "text"),
    [
        ({"failed": {"disk": "no room"}}, Level.FAIL, "no room"),
        ({"is_open": False}, Level.OK, "when the first engine"),
        ({"is_open": True, "tiers": []}, Level.WARN, "no such tier"),
        ({"tiers": [{"name": "disk", "breaker": "open"}]}, Level.FAIL, "left alone"),
        (
            {"tiers": [{"name": "disk", "breaker": "closed", "proof": "awaited"}]},
            Level.FAIL,
            "has not answered yet: not used before it has given bytes back",
        ),
        (
            {"tiers": [{"name": "disk", "breaker": "closed", "proof": "declined"}]},
            Level.WARN,
            "keeps no value, so it is not proven yet",
        ),
        (
            {"tiers": [{"name": "disk", "breaker": "closed"}], "bytes_per_s": {"disk": 1 << 30}},
            Level.OK,
            "reads 1.0 GiB/s",
        ),
    ],
)
def test_a_daemon_that_serves_is_asked(
    movement: Any, level: Level, text: str, tmp_path: Path
) -> None:
    """Its word counts: nothing is opened beside it."""
    with contextlib.closing(DiskTier(tmp_path, 64 << 20, 1 << 20)):
        disk = msgspec.structs.replace(DISK, folder=str(tmp_path))
        found = asked_tier(disk, {"movement": movement})

    assert found.level is level
    assert text in found.text


@pytest.mark.parametrize(
    ("retried", "mend"), [(["s3"], "the daemon tries it again"), ([], "then start the daemon anew")]
)
def test_a_tier_that_is_tried_again_needs_no_new_daemon(retried: list[str], mend: str) -> None:
    """Only one that gave back other bytes is not believed again."""
    movement = {"failed": {"s3": "nobody answers"}, "retried": retried}
    found = asked_tier(
        ObjectStoreTierSettings(url="s3://blocks", name="s3"), {"movement": movement}
    )

    assert mend in found.mend


def test_a_folder_that_another_process_uses_fails(tmp_path: Path) -> None:
    """Without a daemon here, and with one that waits for its first engine: a daemon can't have it.

    Where the folder is the daemon's own, its files are there and locked.
    """
    settings = DiskTierSettings(folder=str(tmp_path), capacity_bytes=64 << 20, name="disk")
    waiting = {"movement": {"is_open": False, "waiting": ["disk"]}}
    serving = {"movement": {"tiers": [{"name": "disk", "breaker": "closed", "num_values": 0}]}}
    tier = DiskTier(tmp_path, 64 << 20, 1 << 20)
    try:
        found = [tried_tier(settings), asked_tier(settings, waiting)]
        own = asked_tier(settings, serving)
    finally:
        tier.close()
    alone = [tried_tier(settings), asked_tier(settings, waiting)]

    assert [each.level for each in found] == [Level.FAIL] * 2
    assert all("another process uses" in each.text for each in found)
    assert own.level is Level.OK
    assert all("another process" not in each.text for each in alone)


def test_two_tiers_of_a_kind_are_told_apart() -> None:
    """Each by its name."""
    found = [
        {"name": "object_store", "breaker": "closed"},
        {"name": "object_store-2", "breaker": "open"},
    ]
    two: list[AnyTierSettings] = [
        ObjectStoreTierSettings(url="s3://a-a"),
        ObjectStoreTierSettings(url="s3://b-b"),
    ]
    named = DaemonSettings(tiers=two).named_tiers
    levels = [asked_tier(tier, {"movement": {"tiers": found}}).level for tier in named]

    assert levels == [Level.OK, Level.FAIL]


def test_a_stack_file_names_ports_and_tiers(tmp_path: Path) -> None:
    """Engines that the stack starts have ports to be had; those with a url have none."""
    file = tmp_path / "two.yaml"
    engines = [{"name": "a", "port": 8123}, {"name": "b", "url": "http://127.0.0.1:1"}]
    file.write_text(json.dumps({"engines": engines, "state_dir": str(tmp_path / "state")}))
    plan = make_plan(None, file)

    assert plan.engine_ports == {"a": 8123}
    assert plan.settings.socket_path == str(tmp_path / "state" / "daemon.sock")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "a", "--stack", "b"], "not both"),
        (["--config", "/nowhere.yaml"], "can't be read"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments: list[str], sentence: str) -> None:
    """Two places to read from, or none."""
    done = CliRunner().invoke(main, ["doctor", *arguments])

    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
