"""Pickles read as data: what torch writes is understood, and nothing is ever run."""

import os
import pickle  # noqa: TID251  # makes what has to be refused
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from kvkeep.cartridges.inert_pickle import PICKLE_BYTES_MAX, Call, Name, Stored, read_inert
from kvkeep.model.errors import CorruptDataError, InputError

NAMES = {"collections.OrderedDict", "__builtin__.set", "builtins.set"}


def read(data: bytes) -> Any:
    return read_inert(data, NAMES, "there")


class Touches:
    """Makes a file when its pickle is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 255, 65535, -1, 1 << 31, -(1 << 40), 0.5, "", "kéy", "x" * 300, (),
        (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], [1, 2], {}, {"a": 1}, {"a": [1], 2: (3,)},
    ],
)  # fmt: skip
def test_plain_values_are_what_they_were(value: object, protocol: int) -> None:
    """Numbers, texts, lists, tuples and dictionaries, in every form that pickle writes."""
    assert read(pickle.dumps(value, protocol)) == value


def test_a_value_named_twice_is_one() -> None:
    """The memo is understood."""
    inner = [1]
    found = read(pickle.dumps([inner, inner], 2))

    assert found == [[1], [1]]
    assert found[0] is found[1]


def test_a_call_stays_a_call() -> None:
    """What would be made is told by name, with what would be put into it."""
    found = read(pickle.dumps(OrderedDict(a=1, b=2), 2))

    assert isinstance(found, Call)
    assert (found.name, found.args, found.items) == (
        "collections.OrderedDict",
        (),
        {"a": 1, "b": 2},
    )


def test_a_state_stays_beside_its_call() -> None:
    """Nothing is set anywhere."""
    found = read(b"\x80\x02ccollections\nOrderedDict\n)\x81}(X\x01\x00\x00\x00aK\x05ub.")

    assert isinstance(found, Call)
    assert found.state == {"a": 5}


def test_what_lies_elsewhere_is_named() -> None:
    """As torch names its storages."""
    found = read(b"\x80\x02(ccollections\nOrderedDict\nX\x01\x00\x00\x000tQ.")

    assert found == Stored((Name("collections.OrderedDict"), "0"))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_something_runs_nothing(tmp_path: Path, protocol: int) -> None:
    """The oldest trick: it is refused by name, and no file is made."""
    data = pickle.dumps({"trainable_keys": [Touches(tmp_path / "touched")]}, protocol)

    with pytest.raises(InputError, match=r"could run code|opcode"):
        read(data)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\x80\x02cos\nsystem\n.", "os.system"),
        (b"\x80\x02cbuiltins\neval\n.", "builtins.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x02ccollections\nOrderedDict.update\n.", "OrderedDict.update"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"(i__main__\nX\n.", "INST"),
        (b"\x80\x02K\x01(K\x02o.", "OBJ"),
    ],
)
def test_every_way_to_a_name_is_shut(data: bytes, named: str) -> None:
    """By whatever opcode it comes."""
    with pytest.raises(InputError, match=f"there holds .*{named}"):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02]",
        b"\x80\x02K\x01K\x02.",
        b"\x80\x02\x87.",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
        b"\x80\x02]K\x01b.",
        b"\x80\x02\x8a\x05\x01",
        b"X\xff\xff\xff\x7f",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\xff",
    ],
)
def test_what_is_no_whole_pickle_is_refused(data: bytes) -> None:
    """Wherever it ends, and whatever does not fit."""
    with pytest.raises(CorruptDataError, match="there is truncated or damaged"):
        read(data)


def test_a_long_one_is_not_even_begun() -> None:
    """No cartridge needs so many tensors."""
    with pytest.raises(InputError, match="describes its tensors in"):
        read(bytes(PICKLE_BYTES_MAX + 1))
