"""What ``kvkeep cache`` makes of a status; asking real daemons is in tests/integration."""

from typing import Any

import pytest
from click.testing import CliRunner

from kvkeep.cli.cache import (
    parse_namespace,
    rows_of,
    sentence_of,
    sentence_of_missing,
    sentence_of_verified,
    tiers_of,
)
from kvkeep.cli.main import main
from kvkeep.model.errors import InputError

STATUS: dict[str, Any] = {
    "pool": {"block_bytes": 1000},
    "gauges": {"slots": 20.0, "slots_ready": 7.0},
    "counters": {"lookup_blocks": 50, "blocks_lent": 30},
    "movement": {
        "tiers": [
            {
                "name": "disk",
                "breaker": "open",
                "proof": "done",
                "num_values": 5,
                "used_bytes": 5120,
                "capacity_bytes": 1 << 30,
                "reads": {"num_keys": 9, "num_done": 4},
            }
        ],
        "opening": ["s3", "valkey"],
        "failed": {"valkey": "nobody answers"},
        "bytes_per_s": {"disk": 2e9},
    },
}


def test_every_tier_is_a_row() -> None:
    """The pool first, then the open tiers, then those that are not open, with the reason."""
    pool, disk, s3, valkey = rows_of(STATUS)

    assert (pool["num_blocks"], pool["used_bytes"], pool["capacity_bytes"]) == (7, 7000, 20_000)
    assert (pool["num_hits"], pool["num_asked"]) == (30, 50)
    assert (disk["num_blocks"], disk["num_hits"], disk["num_asked"]) == (5, 4, 9)
    assert disk["state"] == "left alone (open)"
    assert disk["bytes_per_s"] == 2e9
    assert s3["state"] == "it is just being opened"
    assert (valkey["state"], valkey["num_blocks"]) == ("nobody answers", None)


def test_a_pool_without_tiers_is_one_row() -> None:
    """Before an engine came there is nothing in it either."""
    (pool,) = rows_of(STATUS | {"movement": None, "gauges": {"slots": 0.0, "slots_ready": 0.0}})

    assert pool["state"] == "no engine has come"


@pytest.mark.parametrize(
    ("movement", "names", "why"),
    [
        ({"failed": {"valkey": "no"}, "tiers": []}, ["pool"], {"valkey": "no"}),
        ({"opening": ["s3"], "tiers": []}, ["pool"], {"s3": "it is just being opened"}),
        ({"opening": ["s3"], "failed": {"s3": "no"}, "tiers": []}, ["pool"], {"s3": "no"}),
        ({"tiers": [{"name": "s3", "proof": "awaited"}]}, ["pool"], {"s3": "not answered"}),
        ({"waiting": ["disk"], "tiers": []}, ["pool"], {"disk": "when the first engine"}),
        ({"tiers": [{"name": "disk", "proof": "done"}]}, ["pool", "disk"], {}),
        (None, ["pool"], {}),
    ],
)
def test_a_tier_that_can_t_be_asked_has_a_reason(
    movement: Any, names: list[str], why: dict[str, str]
) -> None:
    """Whoever means all tiers learns which one was left out."""
    asked, left_out = tiers_of({"movement": movement})

    assert asked == names
    assert left_out.keys() == why.keys()
    assert all(words in left_out[name] for name, words in why.items())


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"num_kept": 0, "is_whole": True}, "disk: 1,234 blocks cleared"),
        ({"num_kept": 2, "is_whole": False}, "2 kept until their leases end"),
        ({"num_kept": 0, "is_whole": False}, "some may be left"),
        ({"num_kept": 0, "is_whole": False, "can_list": False}, "does not remember is left"),
    ],
)
def test_what_was_kept_is_said(found: dict[str, Any], sentence: str) -> None:
    """Why a tier is not empty after it was cleared."""
    assert sentence in sentence_of({"tier": "disk", "num_cleared": 1234, "can_list": True} | found)


@pytest.mark.parametrize(
    ("can_list", "has_more", "num_keys", "words"),
    [
        (True, False, 3, []),
        (True, True, 3, ["there are more than 3"]),
        (False, False, 2, ["x can't list its keys", "there may be others"]),
        (False, False, 0, ["x can't list its keys", "there may be others"]),
        (False, True, 3, ["x can't list its keys", "there are more than 3"]),
    ],
)
def test_what_a_listing_misses_is_said(
    can_list: bool, has_more: bool, num_keys: int, words: list[str]
) -> None:
    """Keys beyond the limit, and those that no tier can name: never silently empty."""
    is_whole = can_list and not has_more
    found = {"tier": "x", "can_list": can_list, "is_whole": is_whole, "has_more": has_more}
    said = sentence_of_missing(found | {"keys": [{}] * num_keys}, 3)

    assert all(word in said for word in words)
    assert bool(said) == bool(words)


def test_as_many_keys_as_the_limit_are_not_more() -> None:
    """Of a tier that can't list its keys, where the rest may be others' and none is known."""
    found = {"tier": "x", "can_list": False, "is_whole": False, "has_more": False}

    assert "more than" not in sentence_of_missing(found | {"keys": [{}] * 3}, 3)


@pytest.mark.parametrize(("can_list", "is_said"), [(True, False), (False, True)])
def test_what_was_not_looked_for_is_said(can_list: bool, is_said: bool) -> None:
    """A tier without a list is verified as far as this daemon remembers it."""
    found = {"tier": "x", "num_right": 1, "num_rotten": 0, "num_unread": 0, "can_list": can_list}

    assert ("remembers" in sentence_of_verified(found)) is is_said


@pytest.mark.parametrize("text", ["", "zz", "00" * 31, "00" * 33])
def test_a_namespace_has_64_digits(text: str) -> None:
    """Whatever else is refused before anyone is asked."""
    with pytest.raises(InputError, match="give 64 hexadecimal digits"):
        parse_namespace(text)


@pytest.mark.parametrize("command", ["stat", "ls", "verify", "clear"])
def test_without_a_daemon_it_is_one_sentence_and_code_2(command: str) -> None:
    """Nobody there."""
    done = CliRunner().invoke(main, ["cache", command, "--socket", "/nowhere/d.sock"])

    assert done.exit_code == 2
    assert "start one with kvkeep daemon" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["ls", "verify", "clear"])
@pytest.mark.parametrize(
    ("tier", "sentence"), [("\udcff", "no text in UTF-8"), ("x" * 300, "at most 256 characters")]
)
def test_a_name_that_no_message_can_hold_is_one_sentence(
    command: str, tier: str, sentence: str
) -> None:
    """Before a daemon is asked; a shell passes any bytes on."""
    done = CliRunner().invoke(main, ["cache", command, "--tier", tier])

    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
