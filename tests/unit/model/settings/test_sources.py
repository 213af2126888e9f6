"""Where settings come from, and who wins."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from kvkeep.model.errors import InputError
from kvkeep.model.settings.sources import FILE_BYTES_MAX, Program, load_settings, read_mapping

PROGRAM = Program(name="clock", prefix="CLOCK_", not_its_own=("CLOCK_ALARM_",), example="hours: 12")


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """Of a clock."""

    hours: Annotated[int, msgspec.Meta(ge=1)] = 24
    hands: int = 2
    label: str = ""


def load(
    text: str | None, environment: dict[str, str], flags: dict[str, object], folder: Path
) -> Settings:
    """Settings of a file with this text."""
    file = None
    if text is not None:
        file = folder / "clock.yaml"
        file.write_text(text)
    return load_settings(Settings, PROGRAM, file, environment, flags)


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path) -> None:
    """The nearest word counts."""
    found = load("hours: 1\nhands: 1\n", {"CLOCK_HANDS": "3"}, {"label": "x"}, tmp_path)

    assert found == Settings(hours=1, hands=3, label="x")
    assert load("hours: 1", {"CLOCK_HOURS": "2"}, {"hours": 3}, tmp_path).hours == 3
    assert load(None, {}, {}, tmp_path) == Settings()


def test_one_environment_serves_several_programs(tmp_path: Path) -> None:
    """What has another's longer prefix is another's; what has only this one must be known."""
    assert load(None, {"CLOCK_ALARM_X": "1", "HOURS": "5"}, {}, tmp_path) == Settings()
    with pytest.raises(InputError) as caught:
        load(None, {"CLOCK_HOUR": "1"}, {}, tmp_path)

    assert str(caught.value) == (
        "the environment's CLOCK_HOUR is not a setting of the clock: unset it, "
        "or choose from hands, hours, label"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("hour: 1", "'hour' is not a setting of the clock: choose from hands, hours, label"),
        ("1: 1", "'1' is not a setting of the clock"),
        ("hours: 0", "hours = 0 can't be: write a whole number of at least 1"),
        ("", "is not a mapping of settings: write lines such as 'hours: 12'"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_can_not_be_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    """It names the field or the file, and the mend."""
    with pytest.raises(InputError) as caught:
        load(text, {}, {}, tmp_path)

    assert sentence in str(caught.value)
    assert not set("\n`$") & set(str(caught.value))


def test_a_program_understands_shorter_words(tmp_path: Path) -> None:
    """It rewrites what was written before it is checked, whoever said it."""

    def prepare(values: dict[str, Any]) -> None:
        values["hours"] = {"day": 24}.get(values.pop("span"), 0)

    found = load_settings(Settings, PROGRAM, None, {}, {"span": "day"}, prepare)
    assert found == Settings(hours=24)


def test_a_file_that_is_none_costs_a_sentence(tmp_path: Path) -> None:
    """Not the machine's memory."""
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    for path, said in (
        (Path("/dev/zero"), "is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "none.yaml", "none.yaml can't be read: No such file"),
        (large, "larger than"),
    ):
        with pytest.raises(InputError, match=said):
            read_mapping(path, "hours: 12")
