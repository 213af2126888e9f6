"""Files of ``torch.save``, read and written without torch and without running their pickles.

Since torch 1.6 such a file is a zip archive, stored and not compressed:

    NAME/data.pkl    which tensors there are: a pickle, read as data (inert_pickle.py)
    NAME/data/0 ...  bytes of their storages
    NAME/byteorder   little, or missing in files of before torch 2.1
    NAME/version     3

Source: torch 2.13, torch/serialization.py (``_save``, ``_load``) and torch/_utils.py
(``_rebuild_tensor_v2``).
"""

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from kvkeep.cartridges.inert_pickle import PICKLE_BYTES_MAX, Call, Name, Stored, read_inert
from kvkeep.client.sequence_tensors import Tensor
from kvkeep.model.errors import CorruptDataError, InputError
from kvkeep.protocol.tensors import DTYPES

_STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "float64",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
}
_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETER = "torch._utils._rebuild_parameter"
_DICT = "collections.OrderedDict"
_LIST = "torch.nn.modules.container.ParameterList"
_SETS = ("__builtin__.set", "builtins.set")
"""Empty ones stand in every ``ParameterList``."""
NAMES = frozenset((*_STORAGES, *_TENSOR, _PARAMETER, _DICT, _LIST, *_SETS))
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of before torch 1.6 begin: a pickle of torch's magic number."""
_BITS: Mapping[int, npt.DTypeLike] = {1: np.uint8, 2: np.dtype("<u2"), 4: np.dtype("<u4")}
_SHAPE_DIMENSIONS_MAX = 8
DEPTH_MAX = 4
VALUES_MAX = 1 << 14
"""A few lines of a pickle can name one list a thousand million times."""


@dataclass(frozen=True)
class SavedTensor:
    """Where a tensor lies in the file, checked against its storage's length."""

    dtype: str
    storage: str
    """Name of the storage in the archive."""
    storage_items: int
    offset: int
    """Its first element, counted in elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""


class TorchFile:
    """An open file of ``torch.save``."""

    def __init__(self, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        """Hold an open archive; `opened` makes one."""
        self._archive = archive
        self._root = root
        self._path = path
        self._last: tuple[str, bytes] | None = None
        self._num_values = 0

    @staticmethod
    @contextlib.contextmanager
    def opened(path: Path) -> "Iterator[TorchFile]":
        """Open a file for as long as the block runs.

        Raises:
            InputError: It can't be opened, or torch before 1.6 wrote it.
            CorruptDataError: It is truncated, or none.
        """
        try:
            with path.open("rb") as file:
                if file.read(len(_BEFORE_1_6)) == _BEFORE_1_6:
                    raise InputError(
                        f"{path} is in the form of before torch 1.6: load and save it with a "
                        "newer torch"
                    )
                with _told(path):
                    archive = zipfile.ZipFile(file)
                with archive:
                    yield TorchFile(archive, _root_of(archive, path), path)
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror}): name another") from error

    def describe(self) -> Any:
        """What was saved: lists, dictionaries, texts, numbers, and a `SavedTensor` for each tensor.

        Parameters are their tensors, and a ``ParameterList`` is a list.

        Raises:
            InputError: It holds something that could run code.
            CorruptDataError: It is not whole.
        """
        if self._has("byteorder") and self._read("byteorder", 16) != b"little":
            raise InputError(f"{self._path} is big-endian: save it on a little-endian machine")
        data = self._read("data.pkl", PICKLE_BYTES_MAX)
        return self._plain(read_inert(data, NAMES, str(self._path)), 0)

    def read(self, saved: SavedTensor) -> npt.NDArray[Any]:
        """Bits of a tensor of a dtype that `DTYPES` knows, in its shape: a copy of its own.

        Raises:
            CorruptDataError: Its storage is not there, or not whole.
        """
        item_bytes = DTYPES[saved.dtype][1]
        # Views of one storage follow one another; one of them is kept, as all may be too much.
        if self._last is None or self._last[0] != saved.storage:
            wanted = saved.storage_items * item_bytes
            data = self._read(saved.storage, wanted)
            if len(data) != wanted:
                raise self._damaged()
            self._last = (saved.storage, data)
        flat: npt.NDArray[Any] = np.frombuffer(self._last[1], dtype=_BITS[item_bytes])
        steps = tuple(stride * item_bytes for stride in saved.strides)
        view = np.lib.stride_tricks.as_strided(
            flat[saved.offset :], saved.shape, steps, writeable=False
        )
        return np.array(view, copy=True, order="C")

    def _has(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._archive.NameToInfo

    def _read(self, name: str, bytes_max: int) -> bytes:
        if not self._has(name):
            raise self._damaged()
        info = self._archive.getinfo(f"{self._root}/{name}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > bytes_max:
            raise InputError(
                f"{name} in {self._path} is compressed or longer than it can be: save it with "
                "torch.save"
            )
        with _told(self._path):
            return self._archive.read(info)

    def _damaged(self) -> CorruptDataError:
        return _damaged(self._path)

    # ---- Values that do nothing, as what they stand for

    def _plain(self, value: Any, depth: int) -> Any:
        """What a value stands for; deeper than any cartridge it is cut off."""
        self._num_values += 1
        if self._num_values > VALUES_MAX:
            raise InputError(
                f"{self._path} holds more than {VALUES_MAX} values: it is no cartridge"
            )
        if depth > DEPTH_MAX:
            return None
        if isinstance(value, list | tuple):
            return [self._plain(each, depth + 1) for each in value]
        if isinstance(value, dict):
            return {key: self._plain(each, depth + 1) for key, each in value.items()}
        if isinstance(value, Call):
            return self._plain_call(value, depth)
        if isinstance(value, Name | Stored):
            raise self._damaged()
        return value

    def _plain_call(self, call: Call, depth: int) -> Any:
        if call.name in _TENSOR:
            return self._tensor(call.args)
        if call.name == _PARAMETER:
            tensor = call.args[0] if call.args else None
            if not isinstance(tensor, Call) or tensor.name not in _TENSOR:
                raise self._damaged()
            return self._tensor(tensor.args)
        if call.name == _DICT:
            return self._plain(call.items, depth)
        if call.name == _LIST:
            return self._parameter_list(call.state, depth)
        if call.name in _SETS:
            return None
        raise self._damaged()

    def _parameter_list(self, state: Any, depth: int) -> list[Any]:
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        items = parameters.items if isinstance(parameters, Call) else parameters
        if not isinstance(items, dict) or list(items) != [str(idx) for idx in range(len(items))]:
            raise self._damaged()
        return [self._plain(each, depth + 1) for each in items.values()]

    def _tensor(self, args: Any) -> SavedTensor:
        match args:
            case (Stored(("storage", Name(kind), str(key), str(), int(num_items))),
                  int(offset), tuple(shape), tuple(strides), *_):  # fmt: skip
                pass
            case _:
                raise self._damaged()
        if kind not in _STORAGES or len(shape) != len(strides):
            raise self._damaged()
        if len(shape) > _SHAPE_DIMENSIONS_MAX or not all(
            isinstance(each, int) and 0 <= each < 1 << 48
            for each in (offset, num_items, *shape, *strides)
        ):
            raise self._damaged()
        last = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        if prod(shape) > num_items or (0 not in shape and last >= num_items):
            raise InputError(
                f"a tensor in {self._path} is larger than what was saved of it: save a copy of it"
            )
        return SavedTensor(
            _STORAGES[kind], f"data/{key}", num_items, offset, tuple(shape), tuple(strides)
        )


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say that a file is truncated or none, whatever the library calls it."""
    try:
        yield
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError,
        OverflowError,
    ) as error:  # fmt: skip
        raise _damaged(path) from error


def _damaged(path: Path) -> CorruptDataError:
    return CorruptDataError(f"{path} is truncated, damaged or no file of torch.save: get it anew")


def _root_of(archive: zipfile.ZipFile, path: Path) -> str:
    roots = [name[: -len("/data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _damaged(path)
    return roots[0]


# ---- Writing


def write_torch_file(file: BinaryIO, root: str, lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Write lists of tensors by name, as ``torch.save`` would write a dictionary of lists.

    Args:
        file: Empty and seekable.
        root: What the archive's folder is called.
        lists: Tensors, each of which gets a storage of its own and one dimension more before its
            own ones, of 1.

    Raises:
        OSError: What writing raised.
    """
    flat = [tensor for tensors in lists.values() for tensor in tensors]
    numbers = {id(tensor): idx for idx, tensor in enumerate(flat)}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        # Without a date of its own an entry has 1980's: equal cartridges make equal files.
        archive.writestr(zipfile.ZipInfo(f"{root}/data.pkl"), _pickled(lists, numbers))
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), b"little")
        for idx, tensor in enumerate(flat):
            archive.writestr(zipfile.ZipInfo(f"{root}/data/{idx}"), tensor.data)
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), b"3\n")


def _pickled(lists: Mapping[str, Sequence[Tensor]], numbers: Mapping[int, int]) -> bytes:
    """A dictionary of lists of tensors, in the second version of the pickle protocol."""
    parts = [b"\x80\x02}("]
    for name, tensors in lists.items():
        parts += [_text(name), b"]("]
        parts += [_pickled_tensor(tensor, numbers[id(tensor)]) for tensor in tensors]
        parts.append(b"e")
    parts.append(b"u.")
    return b"".join(parts)


def _pickled_tensor(tensor: Tensor, number: int) -> bytes:
    kind = next(name for name, dtype in _STORAGES.items() if dtype == tensor.dtype)
    shape = (1, *tensor.shape)
    strides = [prod(shape[idx + 1 :]) for idx in range(len(shape))]
    return b"".join(
        [
            _name(_TENSOR[0]),
            b"((",
            *(_text("storage"), _name(kind), _text(str(number)), _text("cpu")),
            *(_int(prod(shape)), b"tQ"),
            *(_int(0), _tuple(shape), _tuple(strides)),
            *(b"\x89", _name(_DICT), b")R"),
            b"tR",
        ]
    )


def _name(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)


def _tuple(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"
