"""The chain of block hashes: what it must depend on, and what it must not."""

import os
import subprocess
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvkeep.model.hashing import BlockHasher, _encode_tagged
from kvkeep.model.ids import BlockHash, Namespace

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
NAMESPACE = Namespace(bytes(range(32)))
TOKENS = st.lists(st.integers(INT32_MIN, INT32_MAX), max_size=60)
EXTRAS = st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=4)
SECRETS = st.binary(max_size=64)
BLOCK_TOKENS = st.integers(1, 16)


def chain(
    tokens: list[int],
    block_tokens: int = 4,
    *,
    namespace: bytes = NAMESPACE,
    extras: dict[str, str] | None = None,
    secret: bytes = b"",
) -> list[BlockHash]:
    hasher = BlockHasher(Namespace(namespace), block_tokens, extras=extras, secret=secret)
    return list(hasher.extend(tokens))


@given(TOKENS, BLOCK_TOKENS, EXTRAS, SECRETS)
def test_one_hash_for_each_full_block(
    tokens: list[int], block_tokens: int, extras: dict[str, str], secret: bytes
) -> None:
    """There is a hash of 32 bytes for each full block, and no two of a chain are equal."""
    hashes = chain(tokens, block_tokens, extras=extras, secret=secret)

    assert len(hashes) == len(tokens) // block_tokens
    assert all(len(block_hash) == 32 for block_hash in hashes)
    assert len(set(hashes)) == len(hashes)


@given(TOKENS, TOKENS, BLOCK_TOKENS)
def test_a_prefix_has_the_prefix_of_the_hashes(
    tokens: list[int], more: list[int], block_tokens: int
) -> None:
    """What follows a block does not change its hash."""
    hashes = chain(tokens, block_tokens)

    assert chain(tokens + more, block_tokens)[: len(hashes)] == hashes


@given(TOKENS, BLOCK_TOKENS, st.data())
def test_growing_gives_what_the_whole_gives(
    tokens: list[int], block_tokens: int, data: st.DataObject
) -> None:
    """A chain extended in any steps equals the chain made at once."""
    lengths = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    hasher = BlockHasher(NAMESPACE, block_tokens)
    for length in lengths:
        hashes = hasher.extend(tokens[:length])
        assert hashes == chain(tokens[:length], block_tokens)

    assert list(hasher.extend(tokens)) == chain(tokens, block_tokens)


@given(TOKENS, BLOCK_TOKENS, st.data())
def test_a_changed_token_changes_its_block_and_all_after(
    tokens: list[int], block_tokens: int, data: st.DataObject
) -> None:
    """Every token counts for its own block and those behind it, and for none before."""
    num_full = len(tokens) // block_tokens * block_tokens
    assume(num_full)
    at = data.draw(st.integers(0, num_full - 1))
    other = data.draw(st.integers(INT32_MIN, INT32_MAX))
    assume(other != tokens[at])
    before = chain(tokens, block_tokens)
    after = chain([*tokens[:at], other, *tokens[at + 1 :]], block_tokens)
    changed = [one != two for one, two in zip(before, after, strict=True)]

    assert changed == [idx >= at // block_tokens for idx in range(len(before))]


@given(EXTRAS, EXTRAS, SECRETS, SECRETS)
def test_extras_and_secret_change_every_hash(
    extras: dict[str, str], other_extras: dict[str, str], secret: bytes, other_secret: bytes
) -> None:
    """Tenants, adapters and salts never share a block, and equal ones always do."""
    one = chain(list(range(12)), extras=extras, secret=secret)
    two = chain(list(range(12)), extras=other_extras, secret=other_secret)

    if (extras, secret) == (other_extras, other_secret):
        assert one == two
    else:
        assert not set(one) & set(two)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 255))
def test_every_bit_of_the_namespace_counts(namespace: bytes, bit: int) -> None:
    """Two namespaces that differ in one bit share no hash."""
    flipped = bytearray(namespace)
    flipped[bit // 8] ^= 1 << bit % 8
    tokens = list(range(12))

    assert not set(chain(tokens, namespace=namespace)) & set(
        chain(tokens, namespace=bytes(flipped))
    )


@given(st.lists(st.integers(0, 3), min_size=8, max_size=40), BLOCK_TOKENS, BLOCK_TOKENS)
def test_the_size_of_a_block_counts(tokens: list[int], one: int, two: int) -> None:
    """Chains of blocks of different sizes share no hash."""
    assume(one != two)

    assert not set(chain(tokens, one)) & set(chain(tokens, two))


@given(EXTRAS, EXTRAS)
@settings(max_examples=500)
def test_no_two_extras_share_an_encoding(one: dict[str, str], two: dict[str, str]) -> None:
    """The encoding of extras tells them apart, whatever their texts hold."""
    assert (_encode_tagged(one) == _encode_tagged(two)) == (one == two)


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=4))
def test_the_order_of_extras_does_not_count(pairs: list[tuple[str, str]]) -> None:
    """Extras are a mapping, in whatever order it was filled."""
    extras = dict(pairs)

    assert _encode_tagged(extras) == _encode_tagged(dict(reversed(extras.items())))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": "bc"}, {"ab": "c"}),
        ({"a": ""}, {"": "a"}),
        ({"a": "1", "b": "2"}, {"a": "1b2"}),
        ({}, {"": ""}),
        ({"salt": "x"}, {"lora": "x"}),
    ],
)
def test_look_alike_extras_differ(one: dict[str, str], two: dict[str, str]) -> None:
    """Extras whose texts run together to the same letters are still different."""
    assert _encode_tagged(one) != _encode_tagged(two)


@given(TOKENS, st.data())
def test_a_token_that_is_no_int32_changes_nothing(tokens: list[int], data: st.DataObject) -> None:
    """A token id out of range is refused, and the chain goes on as if it had not come."""
    bad = data.draw(
        st.one_of(st.integers(max_value=INT32_MIN - 1), st.integers(min_value=INT32_MAX + 1))
    )
    hasher = BlockHasher(NAMESPACE, 4)
    before = list(hasher.extend(tokens))
    known = tokens[: len(before) * 4]

    with pytest.raises(OverflowError):
        hasher.extend([*known, 1, 2, bad, 3])

    assert list(hasher.hashes) == before
    assert list(hasher.extend([*known, 1, 2, 3, 4])) == chain([*known, 1, 2, 3, 4])


GOLDEN = {
    "plain": "05cd9cd8639c7deffdaa799044bf3442ad363594849669095756b3dfc19838c8",
    "extras": "bd06fd1160035785d173d8c84095d3c1f2cf20bae45d0f9803805ddd8f511ece",
    "secret": "e528ca86143e9018efdfd1cdafb2dffd171e5d0b2d7e70d7ba56e352236c48dc",
    "extreme ids": "39c30a996ef6c3b470007774d42ff30bd1c8c2b2bbe67809b5bb05d9ba691f4b",
}
"""Last hash of a chain: blocks stored by any version of kvkeep lie under these."""


def golden(name: str) -> list[BlockHash]:
    match name:
        case "plain":
            return chain(list(range(40)), 16)
        case "extras":
            return chain(list(range(40)), 16, extras={"lora": "poet", "salt": "ä"})
        case "secret":
            return chain(list(range(40)), 16, secret=b"tenant")
        case "extreme ids":
            return chain([INT32_MIN, -1, 0, INT32_MAX], 2)
    raise KeyError(name)


@pytest.mark.parametrize("name", GOLDEN)
def test_hashes_never_change(name: str) -> None:
    """The hash of known input is what it has always been."""
    assert golden(name)[-1].hex() == GOLDEN[name]


SCRIPT = """
from kvkeep.model.hashing import BlockHasher
hasher = BlockHasher(bytes(range(32)), 16, extras={"salt": "s", "lora": "l", "x": "y"})
print(hasher.extend(list(range(100)))[-1].hex())
"""


def test_every_process_makes_the_same_hashes() -> None:
    """Neither the process nor the seed of Python's own hashes shows in a block hash."""
    extras = {"salt": "s", "lora": "l", "x": "y"}
    expected = chain(list(range(100)), 16, extras=extras)[-1].hex()
    for seed in ("0", "1", "4242", "random"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True
        )

        assert done.stdout.strip() == expected
