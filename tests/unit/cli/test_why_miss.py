"""What ``kvkeep why-miss`` reads and says; asking a real daemon is in tests/integration."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvkeep.cli.main import main
from kvkeep.cli.why_miss import differences, lines_of, read_tokens
from kvkeep.model.errors import InputError

MINE, OTHER = "aa" * 32, "bb" * 32
NAMES: list[dict[str, Any]] = [
    {"namespace": MINE, "num_blocks": 0, "identity": {"weights": "1", "layout.dtype": "float16"}},
    {"namespace": OTHER, "num_blocks": 9, "identity": {"weights": "1", "layout.dtype": "bfloat16"}},
]
REQUEST: dict[str, Any] = {
    "engine_request": "cmpl-1",
    "engine_id": "e",
    "namespace": MINE,
    "num_blocks": 4,
    "num_lent": 0,
    "first_missing": "cc" * 32,
    "reason": {"code": "never_stored", "text": "nobody stored it"},
    "age_s": 3.2,
}


def said(**found: Any) -> str:
    """What a person reads."""
    return "\n".join(lines_of({"namespaces": NAMES} | found))


def test_names_that_differ_are_compared_field_by_field() -> None:
    """Whoever sees no hits at all reads which setting differs between the two engines."""
    text = said(requests=[REQUEST])

    assert "cmpl-1 of engine e, 3 s ago: 0 of 4 blocks lent" in text
    assert "why: nobody stored it" in text
    assert f"{OTHER[:16]} holds 9 blocks and differs in:" in text
    assert "layout.dtype: float16 here, bfloat16 there" in text
    assert "weights" not in text


def test_where_some_blocks_hit_names_are_no_reason() -> None:
    """A prefix that is there in part was looked for under the right name."""
    text = said(requests=[REQUEST | {"num_lent": 2}])

    assert "first missing: block 2" in text
    assert "differs" not in text


def test_a_name_that_nobody_announced_is_explained() -> None:
    """A reset engine goes on under a name of its own."""
    text = said(requests=[REQUEST | {"namespace": "dd" * 32}])

    assert "no engine has announced this namespace" in text


def test_a_short_prompt_is_never_asked_for() -> None:
    """Less than a block: no reason in the cache has to be looked for."""
    prefix = {
        "namespace": MINE, "num_tokens": 7, "num_blocks": 0, "num_ready": 0, "block_tokens": 16,
        "first_missing": None, "reason": {"code": "none", "text": ""},
    }  # fmt: skip

    assert "less than a block of 16 tokens" in said(prefixes=[prefix])


def test_a_field_of_one_name_only_differs() -> None:
    """As when engines of two versions announce themselves."""
    assert differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == [
        ("a", "1", "(not there)"),
        ("c", "(not there)", "3"),
    ]


@pytest.mark.parametrize(("text", "ids"), [("[1, 2, 3]", [1, 2, 3]), ("1 2\n3", [1, 2, 3])])
def test_token_ids_are_read(tmp_path: Path, text: str, ids: list[int]) -> None:
    """A JSON list, or numbers between spaces."""
    (tmp_path / "ids").write_text(text)

    assert read_tokens(tmp_path / "ids") == ids


@pytest.mark.parametrize(
    "text",
    [
        *("", "a b", "[1, null]", "{}", "-1", "[", f"{1 << 31}", "[1e400]", "[Infinity]", "[1.5]"),
        *("[true]", "[NaN]", "9" * 5000, "[" * 200_000),
    ],
    ids=lambda text: text[:12] or "nothing",
)
def test_what_is_no_list_of_token_ids_is_refused(tmp_path: Path, text: str) -> None:
    """With one sentence that says what to write."""
    (tmp_path / "ids").write_text(text)

    with pytest.raises(InputError, match="token ids"):
        read_tokens(tmp_path / "ids")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["id", "--prompt", "x"], "not several"),
        (["x" * 300], "at most 256 characters"),
        (["\udcff"], "no text in UTF-8"),
        (["--tokens", "a", "--salt", "\udcff"], "no text in UTF-8"),
        (["--socket", "/nowhere/d.sock"], "start one with kvkeep daemon"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments: list[str], sentence: str) -> None:
    """Before or instead of asking."""
    done = CliRunner().invoke(main, ["why-miss", *arguments])

    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
