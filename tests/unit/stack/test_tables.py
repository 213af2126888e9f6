"""Every field of a stack file is explained."""

from collections.abc import Callable

import msgspec
import pytest

from kvkeep.stack import tables
from kvkeep.stack.spec import DaemonSpec, EngineSpec, StackSpec


@pytest.mark.parametrize(
    ("table", "struct"),
    [
        (tables.stack_fields, StackSpec),
        (tables.daemon_fields, DaemonSpec),
        (tables.engine_fields, EngineSpec),
    ],
)
def test_every_field_has_a_row(table: Callable[[], str], struct: type[msgspec.Struct]) -> None:
    """A field without an explanation fails here."""
    rows = table().splitlines()[2:]

    assert [row.split("`")[1] for row in rows] == list(struct.__struct_fields__)
    assert all(row.count(" | ") == 2 for row in rows)


def test_sizes_and_texts_are_shown_as_a_file_says_them() -> None:
    """Defaults are what a user would write."""
    assert "| `pool_bytes` | `2GiB` |" in tables.daemon_fields()
    assert "| `name` | required |" in tables.engine_fields()
    assert "| `exact` | `false` |" in tables.stack_fields()
    assert "| `KVBM_SERVER_PORT` | `engines.0.port` |" in tables.environment_table()
