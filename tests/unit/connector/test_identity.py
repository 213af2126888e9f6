"""The namespace: what makes two engines share blocks, and what keeps them apart."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
import torch
from vllm.model_executor import model_loader
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvkeep.connector import compat
from kvkeep.connector.identity import (
    Unsupported,
    check_policy,
    derive,
    derive_layout,
    describe,
    load_secret,
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
    {"load_format": "safetensors"},
    {"load_config": {"model_loader_extra_config": {"num_threads": 4}}},
    {"model_config": {"quantization_config": {"activations": "fp8"}}},
    {"model_config": {"model_impl": "transformers"}},
    {"model_config": {"override_attention_dtype": "float32"}},
    {"cache_config": {"kv_cache_dtype_skip_layers": ["0"]}},
    {"cache_config": {"kv_sharing_fast_prefill": True}},
    {"engine": {"attention_config": SimpleNamespace(backend="FLEX_ATTENTION")}},
    {"engine": {"attention_config": SimpleNamespace(use_prefill_query_quantization=True)}},
    {"engine": {"kernel_config": SimpleNamespace(moe_backend="marlin")}},
    {"engine": {"kernel_config": SimpleNamespace(linear_backend_per_quant={"fp8": "marlin"})}},
    {"engine": {"lora_config": SimpleNamespace(target_modules=["q_proj"])}},
    {"engine": {"lora_config": SimpleNamespace(lora_dtype=torch.float16)}},
    {"engine": {"additional_config": {"plugin": 1}}},
]


@pytest.mark.parametrize("changes", DIFFERENT, ids="-".join)
def test_what_changes_kv_changes_the_namespace(model: Path, changes: dict[str, Any]) -> None:
    """Two engines that would compute other bytes for a block never share it."""
    assert namespace(model, **changes) != namespace(model)


EQUAL: list[dict[str, Any]] = [
    {"model_config": {"max_model_len": 64, "model_impl": "vllm", "enforce_eager": True}},
    {"engine": {"attention_config": SimpleNamespace(backend=SimpleNamespace(name="FLASH_ATTN"))}},
    {"engine": {"kernel_config": SimpleNamespace(moe_backend="auto", linear_backend="auto")}},
    {
        "engine": {
            "lora_config": SimpleNamespace(
                target_modules=None, lora_dtype=torch.bfloat16, max_loras=8
            )
        }
    },
    {"engine": {"speculative_config": SimpleNamespace(method="ngram")}},
    {"load_config": {"model_loader_extra_config": {}, "download_dir": "/elsewhere"}},
]


@pytest.mark.parametrize("changes", EQUAL, ids="-".join)
def test_what_leaves_kv_as_it_is_is_shared(model: Path, changes: dict[str, Any]) -> None:
    """Engines that compute the same function share blocks, however fast they do."""
    assert namespace(model, **changes) == namespace(model)


@pytest.mark.parametrize(
    ("variable", "is_shared"),
    [("VLLM_MARLIN_INPUT_DTYPE", False), ("VLLM_BATCH_INVARIANT", False), ("VLLM_PORT", True)],
)
def test_variables_that_change_numbers_count(
    model: Path, monkeypatch: pytest.MonkeyPatch, variable: str, is_shared: bool
) -> None:
    """The environment may quantize activations, or promise the same bits."""
    before = namespace(model)
    monkeypatch.setenv(variable, "1")

    assert (namespace(model) == before) is is_shared


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=["longrope", "dynamic"],
)
def test_the_greatest_length_may_decide_positions(model: Path, rope: dict[str, Any]) -> None:
    """LongRoPE takes its long factors where the engine admits long prompts."""
    hf = {"rope_parameters": {"rope_theta": 1e4} | rope}
    short, long = (
        namespace(model, hf=hf, model_config={"max_model_len": length}) for length in (4096, 8192)
    )

    assert short != long


# ---- weights


def test_another_load_format_reads_other_weights(tmp_path: Path) -> None:
    """A folder may hold two models: an engine shares with those that read the same files."""
    model, other = (make_weights(tmp_path / name) for name in ("model", "other"))
    (model / "model.pt").write_bytes(b"other weights")
    (other / "model.pt").write_bytes(b"third weights")

    assert namespace(model) == namespace(other)
    assert namespace(model, load_format="pt") != namespace(model)
    assert namespace(model, load_format="pt") != namespace(other, load_format="pt")
    assert namespace(model, load_format="pt") == namespace(model, load_format="pt", engine_id="two")


UNNAMEABLE: list[dict[str, Any]] = [
    *(
        {"load_format": load_format}
        for load_format in (
            "npcache", "tensorizer", "runai_streamer", "sharded_state", "bitsandbytes", "gguf",
            "modelexpress", "ipc_cache", "mistral", "pt", "a plugin's",
        )
    ),
    {"load_config": {"model_loader_extra_config": {"uri": "s3://bucket/model"}}},
    {"load_config": {"model_loader_extra_config": object()}},
    {"model_config": {"model_weights": "s3://bucket/model"}},
    {"model_config": {"model_class_overrides": {"LlamaForCausalLM": "mine:Llama"}}},
    {"model_config": {"trust_remote_code": True, "using_transformers_backend": lambda: True}},
    {"model_config": {"architecture": "Cosmos3ForConditionalGeneration"}},
    {"model_config": {"architecture": "NoModelOfVllm"}},
    {"hf": {"text_model_id": "some/model"}},
    {"hf": {"quantization_config_file": "/somewhere/scales.json"}},
    {"load_format": "dummy", "quantization": "awq"},
    {"engine": {"speculative_config": SimpleNamespace(method="custom_class")}},
    {"engine": {"speculative_config": SimpleNamespace(method="eagle", draft_model_config=None)}},
]  # fmt: skip


@pytest.mark.parametrize("changes", UNNAMEABLE, ids="-".join)
def test_what_cannot_be_named_is_shared_with_nobody(model: Path, changes: dict[str, Any]) -> None:
    """Where other bytes may be loaded than those digested, each start keeps to itself."""
    mine = namespace(model, **changes)

    assert namespace(model, **changes) == mine
    assert namespace(model, engine_id="another", **changes) != mine
    assert namespace(model, instance_id="next start", **changes) != mine


def test_code_of_vllm_is_shared(model: Path) -> None:
    """Permission for a model's own code is nothing where vLLM's is used."""
    changes = {"trust_remote_code": True, "using_transformers_backend": lambda: False}

    assert namespace(model, model_config=changes) == namespace(model)
    assert namespace(model, model_config={"architecture": "LlamaForCausalLM"}) == namespace(model)


def test_a_loader_of_a_plugin_is_shared_with_nobody(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A plugin may put its own loader under the name of one of vLLM's."""
    monkeypatch.setitem(model_loader._LOAD_FORMAT_TO_MODEL_LOADER, "auto", object)

    assert namespace(model, engine_id="one") != namespace(model, engine_id="two")
    assert "load format 'auto' is a plugin's" in caplog.text
    assert "model_identity" in caplog.text


def test_the_reason_is_said_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line says why blocks are not shared, however often the namespace is derived."""
    for _ in range(2):
        namespace(model, load_format="npcache")

    assert caplog.text.count("load format 'npcache'") == 1


def test_dummy_weights_are_those_of_a_rank(model: Path) -> None:
    """They are drawn per tensor, so engines that split tensors in other ways differ."""
    one = namespace(model, load_format="dummy")

    assert namespace(model, load_format="dummy", engine_id="two") == one
    assert namespace(model, load_format="dummy", tp_size=2) != one


def draft(model: Path, method: str = "eagle", **changes: Any) -> dict[str, Any]:
    """An engine that speculates with this model."""
    config = make_config(model, **changes)
    speculation = SimpleNamespace(method=method, draft_model_config=config.model_config)
    return {"speculative_config": speculation}


def test_a_draft_model_is_part_of_a_block(model: Path, tmp_path: Path) -> None:
    """Its layers keep KV beside the target's, computed with its own weights."""
    mine, copy = (make_weights(tmp_path / name, b"draft") for name in ("draft", "copy"))
    other = make_weights(tmp_path / "other", b"daft")
    drafted = namespace(model, engine=draft(mine))

    assert namespace(model, engine=draft(copy)) == drafted
    assert namespace(model) != drafted
    assert namespace(model, engine=draft(other)) != drafted
    assert namespace(model, engine=draft(mine, "eagle3")) != drafted
    assert namespace(model, engine=draft(mine, hf={"rope_theta": 5e5})) != drafted


def test_a_draft_model_may_be_loaded_in_its_own_way(model: Path, tmp_path: Path) -> None:
    """What counts is how the draft is loaded, not how the target is."""
    folder = make_weights(tmp_path / "draft")
    (folder / "model.pt").write_bytes(b"other weights")
    engine = draft(folder)
    before = namespace(model, engine=engine)
    engine["speculative_config"].draft_load_config = SimpleNamespace(load_format="pt")
    mine = namespace(model, engine=engine)
    (folder / "model.pt").write_bytes(b"third weights")

    assert mine not in (before, namespace(model, engine=engine))


def test_the_identity_is_told_in_words(model: Path) -> None:
    """Each field by its name, long ones cut, so that two engines can be compared."""
    config = make_config(model, hf={"long": ["x" * 100] * 9})
    layout = derive_layout(config, make_cache_config())
    parts = describe(config, layout, ConnectorSettings(socket="s", tenant="a"))
    words = {part.name: part.value for part in parts}

    assert words["layout.block_tokens"] == "16"
    assert words["config.hidden_size"] == "128"
    assert words["tenant"] == "a"
    assert len(words["config.long"]) == 256
    assert len(parts) <= 256


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
        ({"engine": {"weight_transfer_config": object()}}, ()),
        ({"engine": {"diffusion_config": object()}}, ()),
        ({}, (make_spec(attention_chunk_size=64),)),
        ({}, (make_spec(non_causal=True),)),
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
    ids=[
        "pipeline", "context", "scales", "training", "diffusion", "chunks", "non-causal",
        "two-groups", "window", "window-spec",
    ],
)  # fmt: skip
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


# ---- policy


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
