"""What an engine's blocks depend on besides tokens: the namespace, derived so that it fails closed.

Both halves of the connector derive it from the same configuration; the worker refuses steps whose
namespace it did not derive itself. Where the weights can't be named by their bytes, the namespace
holds a number drawn at this start, so that nothing is shared rather than something wrong.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import vllm

from kvkeep.connector import compat
from kvkeep.connector.settings import ConnectorSettings
from kvkeep.connector.sources import Unnameable, load_format_of, name_weights
from kvkeep.model.errors import InputError
from kvkeep.model.ids import Namespace
from kvkeep.model.layout import KvLayout, derive_namespace
from kvkeep.model.tenant import TenantSecret
from kvkeep.protocol import messages as m
from kvkeep.tiers.wrappers.key_ring import read_key_file
from kvkeep.transfer.int8_form import Int8Form

log = logging.getLogger(__name__)

_NO_PART_OF_A_MODEL = frozenset(
    ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype")
)


_STUDIED_BACKENDS = frozenset(("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "CPU_ATTN"))
"""Their pages hold the same bytes for the same page format."""
_DRAFTS_WITHOUT_KV = frozenset(("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"))
_DRAFTS_WITH_KV = frozenset(("eagle", "eagle3", "mtp", "dflash", "dspark", "draft_model"))
_ATTENTION = (
    "disable_flashinfer_q_quantization", "use_non_causal", "use_prefill_query_quantization",
    "use_trtllm_attention",
)  # fmt: skip
"""Switches of attention that change what it computes: most quantize queries."""
_ENVIRONMENT = (
    "BATCH_INVARIANT", "E8M0", "EMULATION", "F16_ACCUM", "FP4", "FP8", "INPUT_DTYPE", "INT4",
    "LOW_PRECISION", "MATMUL_PRECISION", "QUANT", "ROUTING_SIMULATION", "W4A8",
)  # fmt: skip
"""Variables VLLM_* with one of these in their names change what is computed, or how exactly."""
_LENGTH_MATTERS = ("longrope", '"su"', '"dynamic"', "llama4")
"""With these in a model's configuration, the maximum length picks RoPE factors or the scale of
attention (vllm 0.32, rotary_embedding/phi3_long_rope_scaled_rope.py, models/llama4.py)."""


class Unsupported(Exception):
    """Why this engine's KV can't be kept; it then runs as if without kvkeep."""


def derive_layout(vllm_config: Any, kv_cache_config: Any) -> KvLayout:
    """How this engine's blocks lie, all ranks together.

    Raises:
        Unsupported: The engine keeps KV in a way that kvkeep does not handle.
    """
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise Unsupported("pipeline parallelism is not supported")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise Unsupported(f"{name} > 1 is not supported")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise Unsupported(f"models with {len(groups)} KV cache groups are not supported")
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ != "FullAttentionSpec" or getattr(spec, "sliding_window", None):
        raise Unsupported(f"{type(spec).__name__} layers are not supported")
    if getattr(spec, "attention_chunk_size", None) or getattr(spec, "non_causal", False):
        raise Unsupported("layers that don't attend to all tokens before, and these only, are not")
    # Nobody tells a connector when the weights change, and vLLM's own reset leaves it out.
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        raise Unsupported("weights that change while the engine runs are not supported")
    if getattr(vllm_config, "diffusion_config", None) is not None:
        raise Unsupported("diffusion models are not supported")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise Unsupported("KV scales computed from data differ between engines")
    if spec.page_size_bytes % spec.num_kv_heads:
        raise Unsupported("the KV heads of a block are of unequal size")
    try:
        page_format = compat.page_format(
            spec, vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
        )
    except NotImplementedError as error:
        raise Unsupported(str(error)) from error
    return KvLayout(
        num_layers=len(groups[0].layer_names),
        num_heads=compat.total_kv_heads(vllm_config),
        page_bytes=spec.page_size_bytes // spec.num_kv_heads,
        block_tokens=spec.block_size,
        dtype=compat.cache_dtype_name(vllm_config),
        page_format=page_format,
    )


def make_form(layout: KvLayout, settings: ConnectorSettings) -> Int8Form | None:
    """The form in which this engine's pages are stored; None: as they are.

    Args:
        layout: Of the blocks as the engine keeps them.
        settings: Of the connector.

    Raises:
        InputError: Pages of this type have no such form. The engine does not start: it would store
            twice the bytes that were asked for, under another name.
    """
    if settings.kv_form == "exact":
        return None
    return Int8Form(layout.dtype, layout.page_bytes)


def stored_layout(layout: KvLayout, form: Int8Form | None) -> KvLayout:
    """How blocks lie in the pool: as the engine keeps them, or in their form."""
    if form is None:
        return layout
    page_format = f"{layout.page_format} {form.name}"
    return replace(layout, page_bytes=form.stored_bytes, page_format=page_format)


def load_secret(settings: ConnectorSettings) -> TenantSecret | None:
    """The tenant's secret, if it has one.

    Raises:
        InputError: The file can't be read, is no key, or is open to others. The engine does not
            start: without the secret it would look for its blocks under names that anyone knows.
    """
    if not settings.tenant_key_file:
        return None
    return TenantSecret(read_key_file(Path(settings.tenant_key_file).expanduser()))


def derive(
    vllm_config: Any,
    layout: KvLayout,
    settings: ConnectorSettings,
    secret: TenantSecret | None = None,
) -> Namespace:
    """The namespace of this engine's blocks, the same on every host for the same model."""
    return derive_namespace(layout, _identity(vllm_config, settings, secret), settings.tenant)


def _identity(
    vllm_config: Any, settings: ConnectorSettings, secret: TenantSecret | None
) -> dict[str, str]:
    """Everything but the layout that decides a block's bytes, by name (decision 0017)."""
    model = vllm_config.model_config
    config = _config_text(model)
    # Left out where blocks are exact, so that those stored before there were forms are found.
    form = {} if settings.kv_form == "exact" else {"kv_form": Int8Form.name}
    return form | {
        "weights": settings.model_identity or _weights_identity(vllm_config),
        "draft": _draft_identity(vllm_config, settings),
        "config": config,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "numerics": json.dumps(_numerics(vllm_config, config), sort_keys=True),
        "tenant_secret": "" if secret is None else secret.fingerprint,
    }


def describe(
    vllm_config: Any,
    layout: KvLayout,
    settings: ConnectorSettings,
    secret: TenantSecret | None = None,
) -> list[m.IdentityPart]:
    """What the namespace is made of, in words: only shown, to explain misses."""
    words = {f"layout.{name}": str(value) for name, value in asdict(layout).items()}
    for name, value in _identity(vllm_config, settings, secret).items():
        if name in ("config", "numerics"):
            fields = json.loads(value)
            words |= {f"{name}.{field}": json.dumps(fields[field]) for field in sorted(fields)}
        else:
            words[name] = value
    words["tenant"] = settings.tenant
    words.setdefault("kv_form", settings.kv_form)
    parts = [m.IdentityPart(name[: m.NAME_MAX], _cut(words[name])) for name in words]
    return parts[: m.IDENTITY_PARTS_MAX]


def _cut(value: str) -> str:
    """A value short enough to be sent; of a long one its start, and a digest of the whole."""
    if len(value) <= m.NAME_MAX:
        return value
    digest = hashlib.blake2b(value.encode(), digest_size=8).hexdigest()
    return f"{value[: m.NAME_MAX - len(digest) - 4]}... {digest}"


def _model_config(model: Any) -> dict[str, Any]:
    """The model's own configuration, overrides included, without what says where it came from."""
    config: dict[str, Any] = json.loads(model.hf_config.to_json_string(use_diff=False))
    return {name: value for name, value in config.items() if name not in _NO_PART_OF_A_MODEL}


def _config_text(model: Any) -> str:
    return json.dumps(_model_config(model), sort_keys=True)


def _weights_identity(vllm_config: Any) -> str:
    """The target model's weights, and how they are loaded."""
    load = vllm_config.load_config
    if load_format_of(load) == "dummy":
        return _dummy_identity(vllm_config)
    return _named_weights(vllm_config, vllm_config.model_config, load)


@functools.lru_cache(maxsize=64)
def _say_once(warning: str) -> None:
    """Warn once in a process: a namespace is derived, and then described."""
    log.warning(warning)


def _dummy_identity(vllm_config: Any) -> str:
    """Dummy weights follow from a fixed seed, per tensor as each rank holds it.

    So they are equal on the same build, split in the same way; whole numbers are left as the
    memory was (vllm 0.26 to 0.33, weight_utils.py, initialize_dummy_weights).
    """
    if vllm_config.model_config.quantization is not None:
        return f"unknown {start_identity(vllm_config)}"
    parallel = vllm_config.parallel_config
    split = [
        getattr(parallel, name, None)
        for name in ("tensor_parallel_size", "data_parallel_size", "enable_expert_parallel")
    ]
    return f"dummy vllm-{vllm.__version__} {split}"


def _named_weights(vllm_config: Any, model: Any, load: Any) -> str:
    """A model's weights by their bytes; where that can't be, something nobody else has."""
    try:
        digest = name_weights(model, load, _model_config(model))
    except Unnameable as reason:
        _say_once(
            f"kvkeep can't name the weights of {model.model} by their bytes: {reason}; blocks are "
            "not shared with other engines: set model_identity in kv_connector_extra_config"
        )
        # Drawn anew at each start, and the same in all processes of the engine.
        return f"unknown {start_identity(vllm_config)}"
    extra = getattr(load, "model_loader_extra_config", None) or {}
    return f"{digest} {load_format_of(load)} {json.dumps(extra, sort_keys=True)}"


def _draft_identity(vllm_config: Any, settings: ConnectorSettings) -> str:
    """The draft model, where its layers keep KV among the target's.

    The target's own KV does not depend on drafts: it computes all that is proposed, and what it
    refuses is computed again in the same place before anybody reads it (vllm 0.26 to 0.33,
    v1/core/sched/scheduler.py, update_from_output: num_rejected). So a draft without KV of its
    own, like n-grams, is no part of a block.
    """
    drafts = getattr(vllm_config, "speculative_config", None)
    if drafts is None or drafts.method in _DRAFTS_WITHOUT_KV:
        return ""
    model = getattr(drafts, "draft_model_config", None)
    if drafts.method not in _DRAFTS_WITH_KV or model is None:
        _say_once(
            f"kvkeep does not know speculative method {drafts.method}; blocks are not shared with "
            "other engines"
        )
        return f"unknown {start_identity(vllm_config)}"
    load = getattr(drafts, "draft_load_config", None) or vllm_config.load_config
    if settings.model_identity:
        weights = settings.model_identity
    elif load_format_of(load) == "dummy":
        weights = _dummy_identity(vllm_config)
    else:
        weights = _named_weights(vllm_config, model, load)
    parts = [drafts.method, weights, _config_text(model), str(model.dtype), str(model.quantization)]
    return json.dumps(parts)


def _numerics(vllm_config: Any, config: str) -> dict[str, str]:
    """Settings of the engine that change what is computed; what is as usual is left out.

    Not what only changes the order in which the same numbers are added: parallel sizes, batch
    sizes, compilation, the kernels that vLLM picks for a device.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    found: dict[str, Any] = {
        "quantization_config": getattr(model, "quantization_config", None),
        "model_impl": _unless(getattr(model, "model_impl", None), "auto", "vllm"),
        "attention_dtype": getattr(model, "override_attention_dtype", None),
        "skip_layers": getattr(cache, "kv_cache_dtype_skip_layers", None),
        "fast_prefill": getattr(cache, "kv_sharing_fast_prefill", None),
        "additional_config": getattr(vllm_config, "additional_config", None),
    }
    if any(word in config for word in _LENGTH_MATTERS):
        found["max_model_len"] = getattr(model, "max_model_len", None)
    attention = getattr(vllm_config, "attention_config", None)
    backend = getattr(attention, "backend", None)
    found["attention"] = _unless(getattr(backend, "name", backend), *_STUDIED_BACKENDS)
    for name in _ATTENTION:
        found[name] = getattr(attention, name, None)
    kernels = getattr(vllm_config, "kernel_config", None)
    for name in ("moe_backend", "linear_backend", "linear_backend_per_quant"):
        found[name] = _unless(getattr(kernels, name, None), "auto")
    lora = getattr(vllm_config, "lora_config", None)
    found["lora_modules"] = getattr(lora, "target_modules", None)
    found["lora_dtype"] = _unless(getattr(lora, "lora_dtype", None), "auto", str(model.dtype))
    found["environment"] = _environment(os.environ)
    return {name: repr(value) for name, value in found.items() if value}


def _unless(value: Any, *usual: str) -> str | None:
    """A value as text, unless it is one of these or none."""
    text = str(getattr(value, "value", value) or "")
    return None if text in usual else text


def _environment(variables: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(
        (name, value)
        for name, value in variables.items()
        if name.startswith("VLLM_") and any(word in name for word in _ENVIRONMENT)
    )


def start_identity(vllm_config: Any) -> str:
    """What this start of this engine alone is called, in all its processes.

    A user may fix the engine id over restarts; vLLM draws the instance id anew at each (vllm 0.26
    to 0.33, config/vllm.py).
    """
    return f"{vllm_config.kv_transfer_config.engine_id} {vllm_config.instance_id}"


def check_policy(vllm_config: Any, settings: ConnectorSettings) -> None:
    """Refuse a configuration under which a failed load would hurt the user.

    Raises:
        InputError: One sentence with the mend.
    """
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    wanted, why = "recompute", "a block that can't be loaded is then computed"
    if settings.cartridges:
        wanted, why = "fail", "placeholder tokens of a cartridge must never be computed"
    elif not compat.is_recompute_sound():
        wanted, why = "fail", "vLLM computes wrongly after a failed load on this platform"
    if policy != wanted:
        raise InputError(
            f"kv_load_failure_policy is {policy!r}: set it to {wanted!r} in --kv-transfer-config, "
            f"because {why}"
        )
