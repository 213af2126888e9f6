"""What does not fit is said in the project's words."""

from typing import Annotated, Any, Literal

import msgspec
import pytest

from kvkeep.model.settings.wording import SHOWN_CHARS_MAX, wording_of


class Disk(msgspec.Struct, forbid_unknown_fields=True, tag_field="kind", tag="disk"):
    """One of two kinds."""

    folder: str
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    files: list[str] = []


class Server(msgspec.Struct, forbid_unknown_fields=True, tag_field="kind", tag="server"):
    """The other."""

    url: str = ""


class Settings(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One field of each type."""

    count: Annotated[int, msgspec.Meta(ge=0, lt=10)] = 0
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    is_on: bool = True
    text: Annotated[str, msgspec.Meta(max_length=3)] = ""
    word: Literal["one", "two"] = "one"
    quotas: dict[Annotated[str, msgspec.Meta(min_length=1)], Annotated[float, msgspec.Meta(le=1)]]
    tiers: list[Disk | Server] = []
    maybe: int | None = None
    below: Server | None = None

    def __post_init__(self) -> None:
        if self.count == 7:
            raise ValueError("seven brings bad luck: write eight")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": "many"}, "count = 'many' can't be: write a whole number"),
        ({"count": -1}, "count = -1 can't be: write a whole number of at least 0"),
        ({"count": 10}, "count = 10 can't be: write a whole number of at most 9"),
        ({"count": 7}, "seven brings bad luck: write eight"),
        ({"share": 0}, "share = 0 can't be: write a number above 0"),
        ({"share": 2.5}, "share = 2.5 can't be: write a number of at most 1"),
        ({"is_on": "maybe"}, "is_on = 'maybe' can't be: write true or false"),
        ({"text": "long"}, "text = 'long' can't be: write text of length 3 or less"),
        ({"text": 5}, "text = 5 can't be: write text"),
        ({"word": "three"}, "word = 'three' can't be: choose from one, two"),
        ({"quotas": {"": 0.5}}, "a name in quotas can't be: write text of length 1 or more"),
        ({"quotas": {"a": 2}}, "quotas[...] can't be so: write a number of at most 1"),
        ({"quotas": 3}, "quotas = 3 can't be: write a mapping"),
        ({"tiers": {}}, "tiers can't be so: write a list"),
        ({"tiers": ["disk"]}, "tiers[0] = 'disk' can't be: write a mapping"),
        ({"tiers": [{}]}, "tiers[0].kind is missing: write it"),
        (
            {"tiers": [{"kind": "tape"}]},
            "tiers[0].kind = 'tape' can't be: choose from disk, server",
        ),
        ({"tiers": [{"kind": "disk"}]}, "tiers[0].folder is missing: write it"),
        (
            {"tiers": [{"kind": "server"}, {"kind": "disk", "folder": "x", "threads": 65}]},
            "tiers[1].threads = 65 can't be: write a whole number of at most 64",
        ),
        (
            {"tiers": [{"kind": "server", "folder": "x"}]},
            "'tiers[0].folder' is not a setting here: choose from url",
        ),
        (
            {"tiers": [{"kind": "disk", "folder": "x", "files": [1]}]},
            "tiers[0].files[0] = 1 can't be: write text",
        ),
        ({"maybe": "x"}, "maybe = 'x' can't be: write a whole number or nothing"),
        ({"below": 3}, "below = 3 can't be: write a mapping or nothing"),
        ({"below": {"uri": ""}}, "'below.uri' is not a setting here: choose from url"),
    ],
)
def test_each_complaint_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    """It names the field as it stands in the file, what was written, and what to write."""
    whole: dict[str, Any] = {"quotas": {}, **values}
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(whole, Settings, strict=False)

    assert wording_of(str(caught.value), whole, Settings) == sentence


def test_a_long_value_is_cut() -> None:
    """The sentence stays one."""
    values = {"text": "x" * 10 * SHOWN_CHARS_MAX, "quotas": {}}
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(values, Settings)

    assert len(wording_of(str(caught.value), values, Settings)) < 2 * SHOWN_CHARS_MAX
