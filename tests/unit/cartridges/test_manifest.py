"""What a cartridge says of itself, and whether it goes with an engine."""

from typing import Any

import msgspec
import pytest

from kvkeep.cartridges.manifest import (
    MANIFEST_BYTES_MAX,
    Expected,
    Manifest,
    check_expected,
    checked_manifest,
    find_mismatches,
    identity_of,
    parse_manifest,
)
from kvkeep.model.errors import CorruptDataError, InputError, RefusedError
from kvkeep.protocol.messages import IdentityPart

MADE = Manifest(
    cartridge_id="ships",
    model="org/model",
    num_layers=28,
    num_heads=8,
    head_dim=128,
    dtype="bfloat16",
    num_tokens=2050,
    num_aligned_tokens=2048,
    block_tokens=16,
    num_blocks=128,
    num_frozen_tokens=1,
    sha256="0" * 64,
    num_bytes=2 * 28 * 8 * 128 * 2050 * 2,
    created="2026-01-31T12:00:00Z",
    num_training_steps=2694,
    source="a logbook",
    labels={"topic": "ships", "harbor": "Leith"},
)
GOES = Expected(
    model="org/model", num_layers=28, num_heads=8, head_dim=128, dtype="bfloat16", block_tokens=16
)
OTHERS: dict[str, Any] = {
    "model": "org/other",
    "num_layers": 32,
    "num_heads": 4,
    "head_dim": 64,
    "dtype": "float16",
    "block_tokens": 32,
}


def changed(**fields: Any) -> Manifest:
    return msgspec.structs.replace(MADE, **fields)


# ---- Whether it goes with an engine


def test_one_that_goes_has_no_mismatches() -> None:
    """All that is compared is equal, and what is not named is not compared."""
    assert find_mismatches(MADE, GOES) == find_mismatches(MADE, Expected()) == []


@pytest.mark.parametrize("name", OTHERS)
def test_each_mismatch_is_named(name: str) -> None:
    """One field that differs makes one message, with both values."""
    expected = Expected(**{name: OTHERS[name]})

    (told,) = find_mismatches(MADE, expected)

    assert told == f"{name} mismatch, cartridge {getattr(MADE, name)} and engine {OTHERS[name]}"


def test_every_mismatch_is_told_at_once() -> None:
    """Nobody has to try as often as there are mistakes."""
    expected = Expected(**OTHERS)

    assert len(find_mismatches(MADE, expected)) == 6
    with pytest.raises(RefusedError, match="cartridge ships does not go with this engine: model"):
        check_expected(MADE, expected)


def test_known_weights_decide_and_not_a_name() -> None:
    """The same weights from another folder are the same model, and others of that name are not."""
    mine = changed(identity={"weights": "abc"})

    assert find_mismatches(mine, Expected(model="there", identity={"weights": "abc"})) == []
    assert find_mismatches(mine, Expected(model="org/model", identity={"weights": "xyz"})) == [
        "weights mismatch, cartridge abc and engine xyz"
    ]


def test_an_identity_is_compared_entry_by_entry() -> None:
    """What only one side says is a mismatch too: identity fails closed."""
    mine = changed(identity={"weights": "abc", "config.rope_theta": "10000"})
    theirs = {"weights": "abc", "config.rope_theta": "500000", "dtype": "bfloat16"}

    assert find_mismatches(mine, Expected(identity=theirs)) == [
        "config.rope_theta mismatch, cartridge 10000 and engine 500000",
        "dtype mismatch, cartridge nothing and engine bfloat16",
    ]
    assert find_mismatches(MADE, Expected(identity=theirs)) == []


def test_an_engine_s_layout_and_tenant_are_no_part_of_a_cartridge() -> None:
    """Of what a connector says of its namespace, what decides canonical KV is taken."""
    names = ["layout.page_format", "weights", "config.hidden_size", "tenant", "tenant_secret"]
    parts = [IdentityPart(name, "x") for name in [*names, "kv_form"]]

    assert list(identity_of(parts)) == ["weights", "config.hidden_size"]


# ---- As JSON


def test_it_comes_back_as_it_was() -> None:
    """Every field survives."""
    assert parse_manifest(MADE.encoded(), "there") == MADE


def test_it_is_json_with_the_documented_names() -> None:
    """Other programs read it too."""
    told = msgspec.json.decode(MADE.encoded())

    assert told["cartridge_id"] == "ships"
    assert told["labels"] == {"topic": "ships", "harbor": "Leith"}
    assert (told["num_tokens"], told["num_aligned_tokens"], told["num_blocks"]) == (2050, 2048, 128)


def test_unknown_fields_are_passed_over() -> None:
    """A later version may say more."""
    told = msgspec.json.decode(MADE.encoded()) | {"mood": "calm"}

    assert parse_manifest(msgspec.json.encode(told), "there") == MADE


def test_another_form_is_refused_by_name() -> None:
    """A newer file is not half understood."""
    told = msgspec.json.decode(MADE.encoded()) | {"form": "kvkeep.cartridge/2"}

    with pytest.raises(InputError, match=r"there is of the form 'kvkeep.cartridge/2'"):
        parse_manifest(msgspec.json.encode(told), "there")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_blocks": 127}, "num_blocks is 127 and has to be 128"),
        ({"num_aligned_tokens": 2050}, "num_aligned_tokens"),
        ({"num_bytes": 5}, "num_bytes"),
        ({"num_frozen_tokens": 2051}, "num_frozen_tokens"),
        ({"has_token_ids": True}, "num_bytes"),
        ({"num_heads": 0}, "num_heads"),
        ({"dtype": "int8"}, "dtype"),
        ({"sha256": "0" * 64 + "\n"}, "sha256"),
        ({"cartridge_id": "../ships"}, "cartridge_id"),
        ({"cartridge_id": "ships\n"}, "cartridge_id"),
        ({"created": "yesterday"}, "created"),
        ({"labels": {str(number): "" for number in range(65)}}, "labels"),
    ],
)
def test_one_that_contradicts_itself_is_refused(fields: dict[str, Any], named: str) -> None:
    """The sentence names the field, and nothing is believed."""
    told = msgspec.json.decode(MADE.encoded()) | fields

    with pytest.raises(CorruptDataError, match=named):
        parse_manifest(msgspec.json.encode(told), "there")


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b'{"form": 1}', b"[" * 100_000])
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    """Any bytes end as one sentence."""
    with pytest.raises(CorruptDataError, match="the manifest of there can't be used"):
        parse_manifest(text, "there")


def test_one_made_in_python_is_checked_like_one_that_is_read() -> None:
    """What a maker gets wrong is said before anything is written."""
    with pytest.raises(InputError, match=r"can't be described so .*labels"):
        checked_manifest(changed(labels={"topic": 5}))
    with pytest.raises(InputError, match=f"at most {MANIFEST_BYTES_MAX} are taken"):
        checked_manifest(changed(identity={str(number): "x" * 256 for number in range(200)}))
