"""The namespace: what makes two engines share blocks, and what keeps them apart."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
import torch
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvkeep.connector import compat
from kvkeep.connector.identity import (
    Unsupported,
    check_policy,
    derive,
    derive_layout,
    load_secret,
    lora_identity,
)
from kvkeep.connector.settings import ConnectorSettings
from kvkeep.model.errors import InputError
from kvkeep.model.ids import Namespace
from tests.unit.connector.configs import make_cache_config, make_config, make_spec, make_weights


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder."""
    return make_weights(tmp_path / "model")


def namespace(
    model: Path | str, *, spec: Any = None, settings: Any = None, **more: Any
) -> Namespace:
    """What an engine of this model derives."""
    config = make_config(model, **more)
    layout = derive_layout(config, make_cache_config(spec or make_spec()))
    made = ConnectorSettings(**({"socket": "s"} | (settings or {})))
    return derive(config, layout, made, load_secret(made))


# ---- equal and different


def test_engines_of_one_model_share(model: Path, tmp_path: Path) -> None:
    """Neither the engine's id, its place, its tensor parallelism nor its socket counts."""
    copy = make_weights(tmp_path / "elsewhere")
    mine = namespace(model)

    assert namespace(model) == mine
    assert namespace(copy, engine_id="engine-2") == mine
    assert namespace(model, tp_size=2, rank=1, spec=make_spec(num_kv_heads=1)) == mine
    assert namespace(model, settings={"socket": "t", "lease_s": 7.0, "copy_threads": 3}) == mine
    assert namespace(model, cache_dtype="bfloat16") == mine


DIFFERENT: list[dict[str, Any]] = [
    {"dtype": torch.float16, "spec": make_spec(dtype=torch.float16)},
    {"dtype": torch.float32, "spec": make_spec(dtype=torch.float32)},
    {"spec": make_spec(block_size=32)},
    {"spec": make_spec(head_size=64)},
    {"quantization": "awq"},
    {"settings": {"tenant": "b"}},
    {"settings": {"model_identity": "mine"}},
    {"hf": {"rope_theta": 5e5}},
    {"hf": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
    {"hf": {"rms_norm_eps": 1e-5}},
    {"hf": {"num_key_value_heads": 4}, "spec": make_spec(num_kv_heads=4)},
    {"load_format": "dummy"},
]


@pytest.mark.parametrize("changes", DIFFERENT, ids="-".join)
def test_what_changes_kv_changes_the_namespace(model: Path, changes: dict[str, Any]) -> None:
    """Two engines that would compute other bytes for a block never share it."""
    assert namespace(model, **changes) != namespace(model)


def test_other_weights_never_share(model: Path, tmp_path: Path) -> None:
    """Equal configurations over other bytes of weights are other models."""
    other = make_weights(tmp_path / "other", b"weighty")

    assert namespace(other) != namespace(model)


def test_other_page_formats_never_share(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of one backend mean nothing to another."""
    mine = namespace(model)
    monkeypatch.setattr(compat, "page_format", lambda *_: "another")

    assert namespace(model) != mine


def test_a_model_that_cannot_be_found_shares_with_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Without its weights' bytes an engine keeps to itself, and says how to mend that."""
    name = "kvkeep-test/no-such-model"
    mine = namespace(name, engine_id="one")

    assert "model_identity" in caplog.text
    assert namespace(name, engine_id="one") == mine
    assert namespace(name, engine_id="two") != mine
    assert namespace(name, engine_id="one", instance_id="next start") != mine
    vouched = {"model_identity": "v1"}
    assert namespace(name, engine_id="one", settings=vouched) == namespace(
        name, engine_id="two", settings=vouched
    )


# ---- the tenant's secret


def key_file(path: Path, content: bytes, mode: int = 0o600) -> str:
    """A file with a tenant's secret."""
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_engines_with_one_secret_share_and_others_do_not(model: Path, tmp_path: Path) -> None:
    """A tenant's engines agree on any host, however the file is written; nobody else does."""
    raw = {"tenant_key_file": key_file(tmp_path / "raw", bytes(range(32)))}
    text = {"tenant_key_file": key_file(tmp_path / "text", bytes(range(32)).hex().encode() + b"\n")}
    other = {"tenant_key_file": key_file(tmp_path / "other", b"o" * 32)}
    mine = namespace(model, settings=raw)

    assert namespace(model, settings=text) == mine
    assert namespace(model) != mine
    assert namespace(model, settings=other) != mine
    assert namespace(model, settings=raw | {"tenant": "b"}) != mine


@pytest.mark.parametrize(
    ("content", "mode", "mend"),
    [(b"short", 0o600, "head -c 32"), (b"k" * 32, 0o640, "chmod 600"), (None, 0, "name another")],
    ids=["short", "open", "missing"],
)
def test_a_secret_that_cannot_be_trusted_stops_the_engine(
    tmp_path: Path, content: bytes | None, mode: int, mend: str
) -> None:
    """The engine does not start under names that anyone could guess; the secret is not shown."""
    path = str(tmp_path / "key")
    if content is not None:
        key_file(tmp_path / "key", content, mode)

    with pytest.raises(InputError, match=mend) as caught:
        load_secret(ConnectorSettings(socket="s", tenant_key_file=path))
    assert content is None or content.decode() not in str(caught.value).replace(path, "")


# ---- layouts


def test_a_layout_counts_all_ranks(model: Path) -> None:
    """Heads are the model's, pages are a head's, whatever this rank holds."""
    config = make_config(model, tp_size=2)
    layout = derive_layout(config, make_cache_config(make_spec(num_kv_heads=1)))

    assert (layout.num_layers, layout.num_heads, layout.block_tokens) == (3, 2, 16)
    assert layout.page_bytes == 2 * 16 * 32 * 2
    assert layout.dtype == "bfloat16"
    assert layout == derive_layout(make_config(model), make_cache_config())


@pytest.mark.parametrize(
    ("changes", "specs"),
    [
        ({"pp_size": 2}, ()),
        ({"dcp": 2}, ()),
        ({"scales": True}, ()),
        ({}, (make_spec(), make_spec())),
        ({}, (make_spec(sliding_window=128),)),
        (
            {},
            (
                SlidingWindowSpec(
                    block_size=16,
                    num_kv_heads=2,
                    head_size=32,
                    dtype=torch.bfloat16,
                    sliding_window=64,
                ),
            ),
        ),
    ],
    ids=["pipeline", "context", "scales", "two-groups", "window", "window-spec"],
)
def test_what_is_not_understood_is_refused(
    model: Path, changes: dict[str, Any], specs: tuple[Any, ...]
) -> None:
    """An engine whose KV kvkeep was never shown to keep right runs without it."""
    with pytest.raises(Unsupported):
        derive_layout(make_config(model, **changes), make_cache_config(*specs))


def test_an_unknown_platform_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pages were never studied kvkeep stays off, whatever the rest looks like."""
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_type="abacus")
    monkeypatch.setattr(compat, "current_platform", platform)

    with pytest.raises(Unsupported, match="abacus"):
        derive_layout(make_config(model), make_cache_config())


# ---- adapters and policy


def adapter(folder: Path, weights: bytes = b"a", config: bytes = b'{"lora_alpha": 8}') -> Any:
    """A LoRA request for an adapter in this folder."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_bytes(config)
    return SimpleNamespace(lora_path=str(folder))


def test_an_adapter_is_its_weights_and_its_configuration(tmp_path: Path) -> None:
    """A copy is the same adapter; other weights, or another scale for them, make another."""
    mine = lora_identity(adapter(tmp_path / "mine"))

    assert lora_identity(adapter(tmp_path / "copy")) == mine
    assert lora_identity(adapter(tmp_path / "weights", weights=b"b")) != mine
    assert lora_identity(adapter(tmp_path / "scale", config=b'{"lora_alpha": 16}')) != mine


@pytest.mark.parametrize("missing", ["folder", "adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_cannot_be_read_is_refused(tmp_path: Path, missing: str) -> None:
    """Without its bytes nobody knows what an adapter is."""
    request = adapter(tmp_path / "mine")
    if missing == "folder":
        request.lora_path = "someone/adapter"
    else:
        (tmp_path / "mine" / missing).unlink()

    with pytest.raises(Unsupported, match="adapter"):
        lora_identity(request)


@pytest.mark.parametrize(
    ("policy", "cartridges", "is_sound", "wanted"),
    [
        ("fail", False, True, "recompute"),
        ("recompute", True, True, "fail"),
        ("recompute", False, False, "fail"),
    ],
    ids=["plain", "cartridges", "gpu"],
)
def test_a_wrong_failure_policy_stops_the_engine(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    cartridges: bool,
    is_sound: bool,
    wanted: str,
) -> None:
    """A policy under which a failed load hurts is refused in one sentence with the mend."""
    monkeypatch.setattr(compat, "is_recompute_sound", lambda: is_sound)
    settings = ConnectorSettings(socket="s", cartridges=cartridges)
    check_policy(make_config(model, policy=wanted), settings)

    with pytest.raises(InputError) as caught:
        check_policy(make_config(model, policy=policy), settings)
    text = str(caught.value)
    assert "\n" not in text
    assert f"set it to {wanted!r} in --kv-transfer-config" in text
