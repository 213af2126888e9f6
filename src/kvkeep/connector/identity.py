"""What an engine's blocks depend on besides tokens: the namespace, derived so that it fails closed.

Both halves of the connector derive it from the same configuration; the worker refuses steps whose
namespace it did not derive itself. Where the weights can't be named by their bytes, the namespace
holds a number drawn at this start, so that nothing is shared rather than something wrong.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import vllm

from kvkeep.connector import compat
from kvkeep.connector.settings import ConnectorSettings
from kvkeep.connector.weights import digest_folder, find_weights, has_weights
from kvkeep.model.errors import InputError
from kvkeep.model.ids import Namespace
from kvkeep.model.layout import KvLayout, derive_namespace
from kvkeep.model.tenant import TenantSecret
from kvkeep.tiers.wrappers.key_ring import read_key_file

log = logging.getLogger(__name__)

_NO_PART_OF_A_MODEL = frozenset(
    ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype")
)


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
    model = vllm_config.model_config
    config = json.loads(model.hf_config.to_json_string(use_diff=False))
    for name in _NO_PART_OF_A_MODEL:
        config.pop(name, None)
    identity = {
        "weights": settings.model_identity or _weights_identity(vllm_config),
        "config": json.dumps(config, sort_keys=True),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "tenant_secret": "" if secret is None else secret.fingerprint,
    }
    return derive_namespace(layout, identity, settings.tenant)


def _weights_identity(vllm_config: Any) -> str:
    model = vllm_config.model_config
    load_format = str(getattr(vllm_config.load_config.load_format, "value", None)
                      or vllm_config.load_config.load_format)  # fmt: skip
    if load_format == "dummy":
        # Dummy weights follow from a fixed seed (vllm 0.26 to 0.33, weight_utils.py), but on the
        # same kernels and build only.
        return f"dummy vllm-{vllm.__version__}"
    folder = find_weights(model.model, model.revision)
    if folder is None:
        log.warning(
            "kvkeep can't find the weights of %s to name them by their bytes; blocks are not "
            "shared with other engines: set model_identity in kv_connector_extra_config",
            model.model,
        )
        # Drawn anew at each start, and the same in all processes of the engine.
        return f"unknown {start_identity(vllm_config)}"
    return digest_folder(folder)


def start_identity(vllm_config: Any) -> str:
    """What this start of this engine alone is called, in all its processes.

    A user may fix the engine id over restarts; vLLM draws the instance id anew at each (vllm 0.26
    to 0.33, config/vllm.py).
    """
    return f"{vllm_config.kv_transfer_config.engine_id} {vllm_config.instance_id}"


def lora_identity(request: Any) -> str:
    """What a request's LoRA adapter is: the bytes of its weights and of its configuration.

    Raises:
        Unsupported: The adapter can't be read; its KV must not be kept.
    """
    path = Path(str(request.lora_path))
    try:
        # It holds the scale by which the weights count.
        config = (path / "adapter_config.json").read_bytes()
        weights = digest_folder(path) if has_weights(path) else None
    except OSError as error:
        raise Unsupported(f"a LoRA adapter can't be read: {error}") from error
    if weights is None:
        raise Unsupported("a LoRA adapter without weight files can't be identified")
    return f"{weights} {hashlib.blake2b(config, digest_size=16).hexdigest()}"


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
