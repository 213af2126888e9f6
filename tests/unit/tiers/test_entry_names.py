"""Names of blocks on servers, and heads in front of their bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.model.errors import InputError
from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.tiers.entry_names import (
    HEAD_BYTES,
    checked_prefix,
    entry_name,
    is_head_of,
    pack_head,
    parse_entry_name,
)

KEY = BlockKey(Namespace(b"\x01" * 32), BlockHash(b"\xab" * 32), 7)
NAME = f"kvkeep/{'01' * 32}/{'ab' * 32}/7"

keys = st.builds(
    BlockKey,
    st.binary(min_size=32, max_size=32).map(Namespace),
    st.binary(min_size=32, max_size=32).map(BlockHash),
    st.integers(0, 0xFFFF),
)


def test_a_name_is_the_whole_key() -> None:
    """Namespace, hash and group, behind the prefix."""
    assert entry_name(KEY, "kvkeep/") == NAME


@given(keys)
def test_a_name_leads_back_to_its_key(key: BlockKey) -> None:
    """Whatever the key."""
    assert parse_entry_name(entry_name(key, "a/b/"), "a/b/") == key


@pytest.mark.parametrize(
    "name",
    [
        "",
        "kvkeep/",
        NAME[1:],
        NAME + "0000",
        NAME + "\n",
        NAME.replace("/7", "/07"),
        NAME.replace("/7", "/65536"),
        NAME.replace("ab", "AB"),
        NAME.replace("ab", " a", 1),
        NAME.replace("kvkeep/", "kvkeep//"),
    ],
)
def test_another_name_has_no_key(name: str) -> None:
    """Each key has one name, so nothing that merely looks alike is taken for it."""
    assert parse_entry_name(name, "kvkeep/") is None


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Names come from servers: none breaks anything."""
    key = parse_entry_name("kvkeep/" + text, "kvkeep/")

    assert key is None or entry_name(key, "kvkeep/") == "kvkeep/" + text


def test_a_head_belongs_to_one_name_and_length() -> None:
    """Another block's, a longer or shorter value's, or a stranger's is none."""
    head = pack_head(NAME, 1000)

    assert len(head) == HEAD_BYTES
    assert is_head_of(head, NAME, 1000)
    assert not is_head_of(head, NAME, 999)
    assert not is_head_of(head, NAME + "0", 1000)
    assert not is_head_of(b"x" * HEAD_BYTES, NAME, 1000)
    assert not is_head_of(head[:-1], NAME, 1000)
    assert not is_head_of(head[:-1], NAME, -1)


@pytest.mark.parametrize("prefix", ["kvkeep/", "a/b-1/c_2.d/"])
def test_a_safe_prefix_passes(prefix: str) -> None:
    """Parts that each end in a slash."""
    assert checked_prefix(prefix) == prefix


@pytest.mark.parametrize(
    "prefix", ["", "/", "a", "*/", "a//", "../", "a/b", "ä/", "a/" * 65, "a/\n"]
)
def test_an_unsafe_prefix_is_refused(prefix: str) -> None:
    """Signs of patterns and ways out of a folder would reach other people's entries."""
    with pytest.raises(InputError, match="such as 'kvkeep/'"):
        checked_prefix(prefix)
