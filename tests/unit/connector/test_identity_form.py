"""The form in which blocks are stored is in the namespace; exact engines keep theirs."""

from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch

from kvkeep.cli.why_miss import differences
from kvkeep.connector.identity import derive, derive_layout, describe, make_form, stored_layout
from kvkeep.connector.settings import ConnectorSettings
from kvkeep.model.errors import InputError
from kvkeep.model.ids import Namespace
from kvkeep.model.layout import KvLayout, derive_namespace
from kvkeep.transfer.int8_form import Int8Form
from tests.unit.connector.configs import make_cache_config, make_config, make_spec, make_weights

EXACT = ConnectorSettings(socket="s")
INT8 = ConnectorSettings(socket="s", kv_form="int8")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """An engine's configuration."""
    return make_config(make_weights(tmp_path / "model"))


def layout_of(config: Any, settings: ConnectorSettings) -> KvLayout:
    """How this engine's blocks lie in a pool."""
    layout = derive_layout(config, make_cache_config())
    return stored_layout(layout, make_form(layout, settings))


def namespace_of(config: Any, settings: ConnectorSettings) -> Namespace:
    """What this engine derives."""
    return derive(config, layout_of(config, settings), settings)


def test_exact_blocks_keep_their_layout(config: Any) -> None:
    """An engine that asks for nothing stores what it has, under the layout it has."""
    layout = derive_layout(config, make_cache_config())

    assert make_form(layout, EXACT) is None
    assert layout_of(config, EXACT) == layout
    assert stored_layout(layout, None) is layout


def test_blocks_in_eight_bits_have_a_layout_of_their_own(config: Any) -> None:
    """Pages are smaller, the format names the form; all else is the engine's."""
    exact, int8 = layout_of(config, EXACT), layout_of(config, INT8)

    assert exact.page_bytes == 16 * 32 * 2 * 2
    assert int8.page_bytes == 16 * 32 * 2 + 16 * 2
    assert int8.page_format == f"{exact.page_format} {Int8Form.name}"
    assert int8.difference(exact).count(", not ") == 2
    assert "page_format" in int8.difference(exact)


def test_forms_never_share(config: Any) -> None:
    """Neither with exact blocks, nor by the layout alone, nor with another version of the form."""
    exact, int8 = namespace_of(config, EXACT), namespace_of(config, INT8)

    assert int8 != exact
    assert int8 != derive(config, layout_of(config, INT8), EXACT)
    assert int8 != derive(config, layout_of(config, EXACT), INT8)
    assert int8 == namespace_of(config, INT8)


def test_another_version_of_the_form_is_another_namespace(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changes the form changes its name, and finds nothing of before."""
    before = namespace_of(config, INT8)
    exact = namespace_of(config, EXACT)
    monkeypatch.setattr(Int8Form, "name", "int8-64-v2")

    assert namespace_of(config, INT8) != before
    assert namespace_of(config, EXACT) == exact


def test_exact_namespaces_are_those_of_before_there_were_forms(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exact engines stored is found again: the setting adds nothing to their names."""
    found: list[dict[str, str]] = []

    def note(layout: KvLayout, identity: Any, tenant: str = "") -> Namespace:
        found.append(dict(identity))
        return derive_namespace(layout, identity, tenant)

    monkeypatch.setattr("kvkeep.connector.identity.derive_namespace", note)
    namespace_of(config, EXACT)

    assert sorted(found[0]) == [
        "config", "draft", "dtype", "numerics", "quantization", "tenant_secret", "weights",
    ]  # fmt: skip


def test_a_miss_between_forms_names_the_field(config: Any) -> None:
    """What two engines announce differs in the form and in what follows from it."""
    mine, other = (
        {part.name: part.value for part in describe(config, layout_of(config, s), s)}
        for s in (INT8, EXACT)
    )

    assert {name for name, _, _ in differences(mine, other)} == {
        "kv_form",
        "layout.page_bytes",
        "layout.page_format",
    }
    assert (mine["kv_form"], other["kv_form"]) == (Int8Form.name, "exact")


def test_a_type_without_such_a_form_stops_the_engine(tmp_path: Path) -> None:
    """KV that is in 8 bits already is refused by name, not stored as something else."""
    config = make_config(make_weights(tmp_path / "m"), cache_dtype="fp8_e4m3")
    layout = derive_layout(config, make_cache_config(make_spec(dtype=torch.float8_e4m3fn)))

    with pytest.raises(InputError, match="fp8_e4m3: leave kv_form out"):
        make_form(layout, INT8)
    assert make_form(layout, EXACT) is None
