"""Cartridges of any shape come back bit by bit, and with any other byte not at all."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.cartridges.checkpoint import read_checkpoint, write_checkpoint
from kvkeep.cartridges.file_format import read_cartridge, verify_cartridge
from kvkeep.cartridges.signing import SigningKey
from kvkeep.model.errors import CorruptDataError, KvkeepError
from tests.unit.cartridges.made import contents, written

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))
DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def kv(draw: st.DrawFn) -> Any:
    """KV of any shape and dtype, with and without frozen tokens."""
    shape = draw(SHAPES)
    return contents(
        draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 1 << 32)),
        dtype=draw(DTYPES),
        shape=shape,
        num_frozen_tokens=draw(st.integers(0, shape[0])),
    )


@settings(max_examples=60)
@given(kv(), st.integers(1, 12), st.dictionaries(TEXTS, TEXTS, max_size=4), TEXTS)
def test_any_cartridge_comes_back_as_it_was(
    made: Any, block_tokens: int, labels: dict[str, str], source: str
) -> None:
    """Whatever its shape, dtype, labels and words."""
    with tempfile.TemporaryDirectory() as folder:
        path, head = written(
            Path(folder), kv=made, block_tokens=block_tokens, labels=labels, source=source
        )
        found = read_cartridge(path)

    assert found.contents.layers == made.layers
    assert found.contents.num_frozen_tokens == made.num_frozen_tokens
    assert (found.head.manifest.labels, found.head.manifest.source) == (labels, source)
    assert head.manifest.num_aligned_tokens == made.num_tokens // block_tokens * block_tokens


@settings(max_examples=40)
@given(kv())
def test_any_checkpoint_comes_back_as_it_was(made: Any) -> None:
    """Through the form that others keep."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "cart.pt", made)
        found = read_checkpoint(Path(folder) / "cart.pt")

    assert (found.layers, found.num_frozen_tokens) == (made.layers, made.num_frozen_tokens)


def signing_key() -> SigningKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A signed cartridge with everything in it."""
    made = contents(1, shape=(3, 1, 2), dtype="bfloat16", token_ids=[1, 2, 3])
    folder = tmp_path_factory.mktemp("good")
    path, _ = written(folder, kv=made, signing_key=signing_key(), labels={"topic": "ships"})
    return path.read_bytes()


def test_every_flipped_bit_of_every_byte_is_refused(good: bytes, tmp_path: Path) -> None:
    """All of them are tried, one bit of each byte: length, header, padding, tensors, ids."""
    path = tmp_path / "flipped"
    for offset in range(len(good)):
        data = bytearray(good)
        data[offset] ^= 1 << (offset % 8)
        path.write_bytes(data)
        try:
            verify_cartridge(path)
        except CorruptDataError:
            continue
        pytest.fail(f"byte {offset} may be another")


@settings(max_examples=80)
@given(st.data())
def test_any_other_bytes_are_refused(good: bytes, data: st.DataObject) -> None:
    """Cut, repeated, exchanged: one of kvkeep's errors, or the very same bytes."""
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, len(good)))
    changed = good[:start] + data.draw(st.binary(max_size=40)) + good[end:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed"
        path.write_bytes(changed)
        try:
            verify_cartridge(path)
        except KvkeepError:
            return
    assert changed == good


@settings(max_examples=120)
@given(st.data())
def test_any_bytes_instead_of_a_checkpoint_end_as_a_sentence(
    data: st.DataObject,
) -> None:
    """Nothing but kvkeep's own errors comes out of a damaged file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cart.pt"
        write_checkpoint(path, contents(1, shape=(2, 1, 2)))
        good = path.read_bytes()
        start = data.draw(st.integers(0, len(good)))
        end = data.draw(st.integers(start, min(len(good), start + 20)))
        path.write_bytes(good[:start] + data.draw(st.binary(max_size=20)) + good[end:])
        try:
            found = read_checkpoint(path)
        except KvkeepError:
            return
    assert found.num_tokens >= 1
