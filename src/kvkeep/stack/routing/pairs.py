"""Whether prefill engines of a stack can hand over to its decode engines; told before a start.

Engines that differ in what decides a block's bytes do not fail one another: through the pool the
decode engine finds nothing and computes every prompt again, and through NIXL it may read bytes that
mean something else to it. Either would show as a slow or a wrong answer at best, so such pairs are
refused by name. Tensor-parallel sizes may differ: blocks are kept head by head.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvkeep.connector.settings import load_settings
from kvkeep.model.errors import InputError

if TYPE_CHECKING:
    from kvkeep.stack.models import Model
    from kvkeep.stack.spec import EngineSpec, StackSpec

Numbered = tuple[int, "EngineSpec"]
"""An engine, and its place in the stack file."""

_NAMED = ("tenant", "tenant_key_file", "model_identity")
"""Settings of kvkeep's connector that are part of what blocks are called."""
_KV_FLAGS = (
    "--kv-cache-dtype",
    "--quantization",
    "--hf-overrides",
    "--load-format",
    "--model-impl",
    "--revision",
)
"""Arguments of vLLM that decide what KV is (vllm 0.32, engine/arg_utils.py)."""


def check_pairs(spec: "StackSpec", *, gpu: bool) -> None:
    """Refuse prefill and decode engines of one model that can't read each other's blocks.

    Engines that run already are judged by what they tell: `kvkeep.stack.routing.running`.

    Args:
        spec: Of the stack.
        gpu: Whether its engines run on GPUs.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    by_model: dict[str, list[Numbered]] = {}
    for idx, engine in enumerate(spec.engines):
        if engine.role != "serve" and engine.url is None:
            by_model.setdefault(spec.served_name_of(engine), []).append((idx, engine))
    for group in by_model.values():
        pool = [each for each in group if each[1].connector == "kvkeep"]
        for each in pool:
            _check_part(each)
        for other in pool[1:]:
            _check_named(spec, pool[0], other)
        nixl = [each for each in group if each[1].connector == "nixl"]
        prefill = [each for each in nixl if each[1].role == "prefill"]
        decode = [each for each in nixl if each[1].role == "decode"]
        for one, other in itertools.product(prefill, decode):
            _check_nixl(spec, one, other, gpu=gpu)


def _check_part(each: Numbered) -> None:
    """Refuse an engine whose connector may not do its part."""
    idx, engine = each
    part = "store" if engine.role == "prefill" else "load"
    if not getattr(load_settings({**engine.connector_settings, "socket": "unused"}), part):
        raise InputError(
            f"engines[{idx}].connector_settings.{part} = false: an engine with role {engine.role} "
            f"hands prompts over through the pool, and has to {part} blocks; leave it out."
        )


def _check_named(spec: "StackSpec", one: Numbered, other: Numbered) -> None:
    """Refuse two engines whose blocks have different names in one pool."""
    settings = [
        load_settings({**each[1].connector_settings, "socket": "unused"}) for each in (one, other)
    ]
    for name in _NAMED:
        first, second = (getattr(each, name) for each in settings)
        if first != second:
            _refuse(f"connector_settings.{name}", one, first, other, second)
    # Whoever gives both one identity vouches for it.
    if not settings[0].model_identity:
        _check_model(spec, one, other)
    _check_flags(one, other)


def _check_nixl(spec: "StackSpec", one: Numbered, other: Numbered, *, gpu: bool) -> None:
    """Refuse what NixlConnector does, or what it should and does not.

    vllm 0.32, v1/nixl/metadata.py (compute_nixl_compatibility_hash) and base_worker.py
    (_validate_remote_agent_handshake); both speak up at the first request only.
    """
    _check_model(spec, one, other)
    if one[1].dtype != other[1].dtype:
        _refuse("dtype", one, one[1].dtype, other, other[1].dtype)
    _check_flags(one, other)
    prefill, decode = one[1], other[1]
    sizes = sorted((prefill.tensor_parallel, decode.tensor_parallel))
    if sizes[1] % sizes[0]:
        raise InputError(
            f"engines[{other[0]}].tensor_parallel = {decode.tensor_parallel}: engines[{one[0]}] "
            f"has {prefill.tensor_parallel}, and NixlConnector splits heads only where one size "
            "divides the other; choose such sizes, or connector: kvkeep."
        )
    if prefill.block_tokens == decode.block_tokens:
        return
    # On a CPU it accepts them and then sorts tokens as GPUs keep them: K is packed otherwise here.
    can_differ = gpu and prefill.tensor_parallel <= decode.tensor_parallel
    if not can_differ or decode.block_tokens % prefill.block_tokens:
        _refuse("block_tokens", one, prefill.block_tokens, other, decode.block_tokens)


def _check_model(spec: "StackSpec", one: Numbered, other: Numbered) -> None:
    first, second = spec.model_of(one[1]), spec.model_of(other[1])
    if first != second:
        _refuse("model", one, first, other, second)


def _check_flags(one: Numbered, other: Numbered) -> None:
    for flag in _KV_FLAGS:
        first, second = (_value_of(flag, each[1].args) for each in (one, other))
        if first != second:
            _refuse(f"args, {flag}", one, first, other, second)


def _value_of(flag: str, args: Sequence[str]) -> str | None:
    """The last value that arguments give a flag, as the engine would take it."""
    found = None
    for idx, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else next(iter(args[idx + 1 : idx + 2]), "")
    return found


def _refuse(field: str, one: Numbered, first: object, other: Numbered, second: object) -> None:
    raise InputError(
        f"engines[{other[0]}].{field} = {_shown(second)}: engines[{one[0]}] has {_shown(first)}, "
        "and engines that hand prompts over to each other need blocks of one kind; give both the "
        "same."
    )


def _shown(value: object) -> object:
    return "nothing" if value in (None, "") else value


def check_heads(spec: "StackSpec", models: Mapping[str, "Model"]) -> None:
    """Refuse tensor-parallel sizes that a model's heads can't be split over.

    Args:
        spec: Of the stack.
        models: By the name that the file has for each; what is not known of one is not judged.

    Raises:
        InputError: One sentence that names the field and the mend; vLLM would say so after half a
            minute.
    """
    for idx, engine in enumerate(spec.engines):
        if engine.url is not None or engine.tensor_parallel == 1:
            continue
        heads = _heads_of(models[spec.model_of(engine)])
        size = engine.tensor_parallel
        if heads is None or _is_divisible(*heads, size):
            continue
        fitting = [str(each) for each in range(1, heads[0] + 1) if _is_divisible(*heads, each)]
        raise InputError(
            f"engines[{idx}].tensor_parallel = {size}: {spec.model_of(engine)} has {heads[0]} "
            f"attention heads and {heads[1]} KV heads, which can't be split over {size} ranks; "
            f"choose one of {', '.join(fitting)}."
        )


def _is_divisible(num_heads: int, num_kv_heads: int, size: int) -> bool:
    """Whether every rank gets as many heads as the others (vllm 0.32, config/model.py)."""
    larger, smaller = max(num_kv_heads, size), min(num_kv_heads, size)
    return num_heads % size == 0 and larger % smaller == 0


def _heads_of(model: "Model") -> tuple[int, int] | None:
    """Attention heads and KV heads by a model's configuration; None where it does not say."""
    try:
        found = json.loads((Path(model.location) / "config.json").read_text())
        num_heads = int(found["num_attention_heads"])
        num_kv_heads = int(found.get("num_key_value_heads") or num_heads)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (num_heads, num_kv_heads) if num_heads > 0 and num_kv_heads > 0 else None
