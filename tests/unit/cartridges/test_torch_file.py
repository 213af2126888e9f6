"""Files of ``torch.save`` without torch: as torch itself reads and writes them."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kvkeep.cartridges.torch_file import SavedTensor, TorchFile, write_torch_file
from kvkeep.client.sequence_tensors import Tensor, as_tensor
from kvkeep.model.errors import CorruptDataError, InputError
from tests.unit.cartridges.made import finite_tensor

DTYPES = ["float32", "float16", "bfloat16"]


def saved(folder: Path, value: object) -> Path:
    path = folder / "saved.pt"
    torch.save(value, path)
    return path


def described(path: Path) -> Any:
    with TorchFile.opened(path) as file:
        return file.describe()


def read_first(path: Path) -> tuple[SavedTensor, Any]:
    with TorchFile.opened(path) as file:
        tensor = file.describe()[0]
        return tensor, file.read(tensor)


def rewritten(path: Path, changes: dict[str, bytes | None], **how: Any) -> Path:
    """The same archive with other entries, as anybody could write it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).split("/")[0]
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, data in (entries | {f"{root}/{key}": changes[key] for key in changes}).items():
            if data is not None:
                archive.writestr(name, data)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_read_bit_by_bit(tmp_path: Path, dtype: str) -> None:
    """As torch saved it, with its shape."""
    tensor = torch.randn(1, 2, 3, 4).to(getattr(torch, dtype))
    told, bits = read_first(saved(tmp_path, [tensor]))

    assert (told.dtype, told.shape) == (dtype, (1, 2, 3, 4))
    assert bits.shape == (1, 2, 3, 4)
    assert bits.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_views_and_parameters_are_their_tensors(tmp_path: Path) -> None:
    """A transposed part of a larger storage, with gradients, is read as what it shows."""
    base = torch.arange(48, dtype=torch.float32).reshape(2, 6, 4)
    view = base.transpose(0, 1)[1:4, :, 1:3]
    path = saved(tmp_path, [view, torch.nn.Parameter(base), base[1]])

    with TorchFile.opened(path) as file:
        tensors = file.describe()
        arrays = [file.read(tensor).view("<f4") for tensor in tensors]

    assert arrays[0].tolist() == view.tolist()
    assert arrays[1].tolist() == base.tolist()
    assert arrays[2].tolist() == base[1].tolist()


def test_what_was_saved_is_described(tmp_path: Path) -> None:
    """Dictionaries, lists of any kind and plain values; a ParameterList is a list."""
    one = torch.zeros(1)
    value = {
        "list": torch.nn.ParameterList([torch.nn.Parameter(one)] * 2),
        "tuple": (one, one),
        "none": [],
        "number": 5,
        "text": "x",
    }
    found = described(saved(tmp_path, value))

    assert (found["none"], found["number"], found["text"]) == ([], 5, "x")
    for name in ("list", "tuple"):
        assert [type(each) for each in found[name]] == [SavedTensor] * 2


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    """With ``weights_only``, in every dtype, frozen lists empty or not."""
    lists = {dtype: [finite_tensor(idx, dtype) for idx in (1, 2)] for dtype in DTYPES}
    with (tmp_path / "made.pt").open("wb") as file:
        write_torch_file(file, "made", {**lists, "none": []})

    loaded = torch.load(tmp_path / "made.pt", weights_only=True)

    assert loaded["none"] == []
    for dtype in DTYPES:
        for tensor, original in zip(loaded[dtype], lists[dtype], strict=True):
            assert tuple(tensor.shape) == (1, *original.shape)
            assert as_tensor(tensor[0]) == original


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """And the same tensors make the same file."""
    lists: dict[str, list[Tensor]] = {"a": [finite_tensor(1), finite_tensor(1)], "b": []}
    files = [io.BytesIO(), io.BytesIO()]
    for each in files:
        write_torch_file(each, "made", lists)
    (tmp_path / "made.pt").write_bytes(files[0].getvalue())

    with TorchFile.opened(tmp_path / "made.pt") as file:
        found = file.describe()
        assert file.read(found["a"][1]).tobytes() == bytes(lists["a"][1].data)
    assert found["b"] == []
    assert files[0].getvalue() == files[1].getvalue()


# ---- Refused


def test_what_could_run_code_is_refused_by_name(tmp_path: Path) -> None:
    """A whole module would need its class."""
    with pytest.raises(InputError, match=r"torch\.nn\.modules\.linear\.Linear, which could run"):
        described(saved(tmp_path, torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    """Wherever it ends."""
    path = saved(tmp_path, [torch.randn(64)])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])

    with pytest.raises(CorruptDataError, match=r"is truncated, damaged or no file of torch.save"):
        described(path)


@pytest.mark.parametrize("data", [b"\x00\xff\xfe\xfd" * 1000, b"PK\x03\x04", b"{}"])
def test_other_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    """Anything that torch did not save."""
    (tmp_path / "other.pt").write_bytes(data)

    with pytest.raises(CorruptDataError, match=r"other\.pt is truncated, damaged or no file"):
        described(tmp_path / "other.pt")


def test_a_flipped_byte_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """The archive has a sum of each storage."""
    path = saved(tmp_path, [torch.full((64,), 3.0)])
    data = bytearray(path.read_bytes())
    data[data.index(b"\x00\x00\x40\x40" * 8)] ^= 1
    path.write_bytes(data)

    with pytest.raises(CorruptDataError, match="truncated, damaged"):
        read_first(path)


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_a_missing_entry_is_refused(tmp_path: Path, name: str) -> None:
    """Half an archive is none."""
    with pytest.raises(CorruptDataError, match="truncated, damaged"):
        read_first(rewritten(saved(tmp_path, [torch.zeros(4)]), {name: None}))


def test_a_storage_of_another_length_is_refused(tmp_path: Path) -> None:
    """Shorter or longer than the tensors say."""
    for data, kind in ((bytes(15), CorruptDataError), (bytes(17), InputError)):
        with pytest.raises(kind):
            read_first(rewritten(saved(tmp_path, [torch.zeros(4)]), {"data/0": data}))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A few bytes could become any number of them."""
    path = saved(tmp_path, [torch.zeros(4)])
    with pytest.raises(InputError, match="is compressed or longer than it can be"):
        described(rewritten(path, {}, compression=zipfile.ZIP_DEFLATED))


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    """Its numbers would be others."""
    with pytest.raises(InputError, match="is big-endian"):
        described(rewritten(saved(tmp_path, [torch.zeros(4)]), {"byteorder": b"big"}))


def test_the_form_before_torch_1_6_is_refused_by_name(tmp_path: Path) -> None:
    """The sentence says what to do."""
    torch.save([torch.zeros(4)], tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    with pytest.raises(InputError, match=r"before torch 1\.6: load and save it"):
        described(tmp_path / "old.pt")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    """One number said to be a thousand million of them would take all memory."""
    with pytest.raises(InputError, match="is larger than what was saved of it"):
        described(saved(tmp_path, [torch.zeros(1).expand(1 << 30)]))


def test_a_file_that_names_one_list_without_end_is_refused(tmp_path: Path) -> None:
    """Each level names the one below a hundred times."""
    value: list[Any] = [0] * 100
    for _ in range(4):
        value = [value] * 100

    with pytest.raises(InputError, match="holds more than"):
        described(saved(tmp_path, value))


def test_a_file_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    """One sentence, which names it."""
    with pytest.raises(InputError, match=r"gone\.pt can't be read \(No such file"):
        described(tmp_path / "gone.pt")
