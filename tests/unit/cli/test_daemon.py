"""The command's flags; the daemon itself runs in tests/integration."""

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from kvkeep.cli import daemon as command
from kvkeep.cli.main import main
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.tables import FILE_ONLY


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DaemonSettings]]:
    """The settings with which a daemon would have run."""
    settings: list[DaemonSettings] = []
    root = logging.getLogger()
    before = root.handlers[:], root.level
    monkeypatch.setattr(command, "run", settings.append)
    yield settings
    root.handlers[:], _ = before
    root.setLevel(before[1])


def test_every_setting_has_a_flag() -> None:
    """What a file can say, a flag can say; but for lists, which fit a file only."""
    flags = {parameter.name for parameter in command.daemon.params}

    assert set(DaemonSettings.__struct_fields__) - FILE_ONLY <= flags


def test_flags_win_over_environment_over_file(
    started: list[DaemonSettings], tmp_path: Path
) -> None:
    """The nearest word counts; the rest keeps its default."""
    file = tmp_path / "d.yaml"
    file.write_text("pool_bytes: 1GiB\nsessions_max: 7\nlease_s_max: 5\n")
    environment = {"KVKEEP_POOL_BYTES": "2GiB", "KVKEEP_SESSIONS_MAX": "8"}

    done = CliRunner().invoke(
        main, ["daemon", "--config", str(file), "--pool-bytes", "3GiB"], env=environment
    )
    assert done.exit_code == 0, done.output
    expected = DaemonSettings(pool_bytes=3 << 30, sessions_max=8, lease_s_max=5.0)
    assert started == [expected]


def test_no_flag_means_no_opinion(started: list[DaemonSettings]) -> None:
    """A switch that was not given leaves the file's word."""
    CliRunner().invoke(main, ["daemon"])
    CliRunner().invoke(main, ["daemon", "--no-verify-on-start"])

    assert started == [DaemonSettings(), msgspec.structs.replace(started[0], verify_on_start=False)]


def test_a_bad_setting_is_one_sentence_and_code_2(started: list[DaemonSettings]) -> None:
    """Nothing is started."""
    done = CliRunner().invoke(main, ["daemon", "--pool-bytes", "much"])

    assert done.exit_code == 2
    assert "'much' is not a size: write a number and a unit" in done.stderr
    assert done.stderr.count("\n") == 1
    assert started == []
