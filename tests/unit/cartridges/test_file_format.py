"""A cartridge as one file: comes back as it was, and with any other byte not at all."""

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import safe_open

from kvkeep.cartridges import file_format
from kvkeep.cartridges.contents import Contents
from kvkeep.cartridges.file_format import (
    copy_cartridge,
    read_cartridge,
    read_head,
    verify_cartridge,
    write_cartridge,
)
from kvkeep.cartridges.manifest import Expected, check_expected
from kvkeep.cartridges.signing import SigningKey
from kvkeep.client.sequence_tensors import as_tensor
from kvkeep.model.errors import CapacityError, CorruptDataError, InputError, RefusedError
from kvkeep.protocol import tensors
from tests.unit.cartridges.made import SHAPE, contents, draft, written

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = PRIVATE.public_key().public_bytes_raw()
KEY = SigningKey(PRIVATE)


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    found: dict[str, Any] = json.loads(data[8 : 8 + length])
    return found


def with_header(path: Path, header: dict[str, Any]) -> None:
    """Write another header before the same tensors, as anybody could."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# ---- Right ones


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    """Every bit of every tensor, the ids, and what its maker said."""
    kv = contents(3, dtype="bfloat16", num_frozen_tokens=2, token_ids=[5, 1, 2**31 - 1, 0, 7, 7])
    path, head = written(tmp_path, kv=kv, labels={"topic": "ships"}, source="a logbook")

    found = read_cartridge(path)

    assert found.contents.layers == kv.layers
    assert found.contents.token_ids is not None
    assert found.contents.token_ids.tolist() == [5, 1, 2**31 - 1, 0, 7, 7]
    assert found.contents.num_frozen_tokens == 2
    assert found.head == head == verify_cartridge(path)
    assert (head.standing, head.signer, head.file_bytes) == ("unsigned", "", path.stat().st_size)
    manifest = head.manifest
    assert (manifest.num_tokens, manifest.num_aligned_tokens, manifest.num_blocks) == (6, 4, 1)
    assert (manifest.num_layers, manifest.num_heads, manifest.head_dim) == (3, 2, 4)
    assert (manifest.labels, manifest.source) == ({"topic": "ships"}, "a logbook")


def test_shorter_than_a_block_has_no_block(tmp_path: Path) -> None:
    """It can still be kept."""
    manifest = written(tmp_path, block_tokens=7)[1].manifest

    assert (manifest.num_tokens, manifest.num_aligned_tokens, manifest.num_blocks) == (6, 0, 0)


def test_other_programs_read_the_tensors(tmp_path: Path) -> None:
    """The file is what the safetensors library says it is."""
    kv = contents(token_ids=range(6))
    path, _ = written(tmp_path, kv=kv)

    with safe_open(path, framework="numpy") as file:
        key = file.get_tensor("layers.1.key")
        ids = file.get_tensor("token_ids")
        manifest = json.loads(file.metadata()["kvkeep.manifest"])

    assert key.tobytes() == bytes(kv.layers[1][0].data)
    assert np.frombuffer(ids.tobytes(), "<i4").tolist() == [0, 1, 2, 3, 4, 5]
    assert manifest["cartridge_id"] == "ships"


def test_the_same_cartridge_is_the_same_file(tmp_path: Path) -> None:
    """Nothing in it depends on when or where it is written; another one has another digest."""
    first, head = written(tmp_path)
    other, other_head = written(tmp_path, "other")

    second = tmp_path / "second"
    write_cartridge(second, draft(), contents())

    assert second.read_bytes() == first.read_bytes()
    assert other_head.digest != head.digest
    assert other.read_bytes()[-100:] == first.read_bytes()[-100:]


def test_a_copy_is_checked_and_equal(tmp_path: Path) -> None:
    """What was copied is what was checked."""
    path, head = written(tmp_path, signing_key=KEY)
    with (tmp_path / "copy").open("wb") as target:
        copied = copy_cartridge(path, target, trusted=[PUBLIC])

    assert copied.digest == head.digest
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


# ---- Wrong ones


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 200, -400, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, count: int) -> None:
    """Wherever it ends."""
    path, _ = written(tmp_path)
    path.write_bytes(path.read_bytes()[:count])

    with pytest.raises(CorruptDataError, match=r"truncated|no cartridge, or damaged"):
        read_head(path)


def test_a_longer_file_is_refused(tmp_path: Path) -> None:
    """What hangs on at the end belongs to something else."""
    path, head = written(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")

    with pytest.raises(CorruptDataError, match=f"it has {head.file_bytes + 1} bytes, and its"):
        read_head(path)


def test_a_wrong_byte_of_a_tensor_is_a_wrong_checksum(tmp_path: Path) -> None:
    """It is noticed before any tensor is handed out, by everything that reads tensors."""
    path, head = written(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert read_head(path) == head
    for read in (read_cartridge, verify_cartridge):
        with pytest.raises(CorruptDataError, match=r"the tensors of .* have another checksum"):
            read(path)


def test_a_wrong_word_in_the_manifest_is_a_wrong_checksum(tmp_path: Path) -> None:
    """A cartridge can't be given another name, model or label by hand."""
    path, _ = written(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"ships", b"shops"))

    with pytest.raises(CorruptDataError, match=r"the manifest of .* has another checksum"):
        read_head(path)


@pytest.mark.parametrize("change", ["swap", "extra", "order", "metadata"])
def test_tensors_have_to_lie_as_the_manifest_says(tmp_path: Path, change: str) -> None:
    """Another table of tensors over the same bytes is refused: it would mix up layers."""
    path, _ = written(tmp_path)
    header = header_of(path)
    if change == "swap":
        one, two = header["layers.0.key"], header["layers.0.value"]
        header["layers.0.key"], header["layers.0.value"] = two, one
    elif change == "extra":
        header["layers.9.key"] = header["layers.0.key"]
    elif change == "order":
        header["__metadata__"] = header.pop("__metadata__")
    else:
        header["__metadata__"]["more"] = "x"
    with_header(path, header)

    with pytest.raises(CorruptDataError, match="does not lie as its manifest says"):
        read_head(path)


@pytest.mark.parametrize("name", ["model", "num_layers", "num_heads", "head_dim", "dtype"])
def test_a_wrong_engine_is_refused_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What does not go with it is named, and no byte of KV is touched."""
    path, _ = written(tmp_path)
    monkeypatch.setattr(file_format, "_read_exactly", lambda *_: pytest.fail("it was read"))
    wrong: dict[str, Any] = {name: "other" if name in ("model", "dtype") else 99}

    with pytest.raises(RefusedError, match=f"{name} mismatch"):
        read_cartridge(path, expected=Expected(**wrong))
    with pytest.raises(RefusedError, match="block_tokens mismatch, cartridge 4 and engine 16"):
        verify_cartridge(path, expected=Expected(block_tokens=16))


def test_signatures_are_demanded_where_keys_are_named(tmp_path: Path) -> None:
    """Before a tensor is read."""
    unsigned, _ = written(tmp_path)
    signed, head = written(tmp_path, "signed", signing_key=KEY)

    assert head.standing == "signed"
    assert read_cartridge(signed, trusted=[PUBLIC]).head.standing == "trusted"
    with pytest.raises(RefusedError, match=r"the signature of .* is missing"):
        read_cartridge(unsigned, trusted=[PUBLIC])
    with pytest.raises(RefusedError, match="not among the trusted ones"):
        read_cartridge(signed, trusted=[bytes(32)])


def test_a_signature_can_t_be_moved_to_another_cartridge(tmp_path: Path) -> None:
    """Not even with all checksums made anew."""
    signed, _ = written(tmp_path, "signed", signing_key=KEY)
    forged, _ = written(tmp_path, "forged")
    metadata = header_of(forged)["__metadata__"]
    stolen = header_of(signed)["__metadata__"]["kvkeep.signature"]
    text = metadata["kvkeep.manifest"].encode()
    header = header_of(forged)
    header["__metadata__"] = {
        "kvkeep.manifest": text.decode(),
        "kvkeep.signature": stolen,
        "kvkeep.sha256": file_format._digest(text, stolen.encode()),
    }
    with_header(forged, header)

    with pytest.raises(CorruptDataError, match="is not that of its manifest"):
        read_head(forged)


def test_nan_with_a_right_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wrote it did not look; whoever reads does."""
    bad = as_tensor(np.full(SHAPE, np.nan, np.float32))
    path, _ = written(tmp_path, kv=Contents(((bad, bad),)))

    with pytest.raises(CorruptDataError, match=r"layers\.0\.key of .* holds NaN or Inf"):
        read_cartridge(path)


def test_a_file_cut_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its length was right when it was opened."""
    path, _ = written(tmp_path, kv=contents(shape=(600, 2, 4)))

    def cut(*args: Any) -> None:
        # More than what is read ahead is left.
        os.truncate(path, path.stat().st_size - 30_000)
        check_expected(*args)

    monkeypatch.setattr(file_format, "check_expected", cut)
    with pytest.raises(CorruptDataError, match="was truncated while it was read"):
        read_cartridge(path, expected=Expected())


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", bytes(4000), b"\x80\x02}q\x00.", tensors.make_header([("a", "int8", [0])])[0]],
)
def test_other_files_are_no_cartridges(tmp_path: Path, data: bytes) -> None:
    """Anything else ends as one sentence."""
    path = tmp_path / "other"
    path.write_bytes(data)

    with pytest.raises(CorruptDataError, match="is no cartridge, or damaged at its beginning"):
        read_head(path)


@pytest.mark.parametrize("name", ["gone", "zero\0byte", "folder", "pipe"])
def test_what_is_no_file_is_bad_input(tmp_path: Path, name: str) -> None:
    """The sentence names it, and nobody waits for a pipe's other end."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(InputError, match="name another"):
        read_head(tmp_path / name)


# ---- Writing


@pytest.mark.parametrize(
    ("error", "kind"), [(errno.ENOSPC, CapacityError), (errno.EROFS, InputError)]
)
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, kind: type[Exception]
) -> None:
    """Whole or not at all, and nothing lies around."""
    path, head = written(tmp_path)

    def fail(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=str(path)):
        write_cartridge(path, draft(), contents(seed=9))

    assert read_head(path) == head
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"block_tokens": 0}, "block_tokens must be at least 1, not 0"),
        ({"created": "today"}, "created"),
        ({"model": ""}, "model"),
        ({"source": "x" * 5000}, "source"),
        ({"labels": {"\ud800": "x"}}, "can't be described so"),
    ],
)
def test_what_can_t_be_said_is_not_written(
    tmp_path: Path, more: dict[str, Any], named: str
) -> None:
    """The maker is told, and there is no file."""
    with pytest.raises(InputError, match=named):
        write_cartridge(tmp_path / "new", draft(**more), contents())

    assert os.listdir(tmp_path) == []
