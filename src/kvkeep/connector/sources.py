"""Where an engine's weights and its model's code come from, as far as that can be named.

A model whose code or weights come from elsewhere than vLLM and the model's own files is told by a
reason; its engine then shares blocks with nobody.
"""

import sys
from collections.abc import Mapping
from typing import Any

from kvkeep.connector.weights import digest_weights, find_folder, is_known

_HARMLESS = frozenset(("enable_multithread_load", "num_threads", "enable_weights_track"))
"""What the default loader may be told (vllm 0.26 to 0.33, default_loader.py): none of it says
which weights are read."""
_ELSEWHERE = frozenset(("text_model_id", "quantization_config_file"))
"""Fields of a model's configuration that name weights or scales kept somewhere else."""


class Unnameable(Exception):
    """Why an engine's weights can't be named by bytes."""


def load_format_of(load: Any) -> str:
    """The load format by name; an enumeration in some versions."""
    return str(getattr(load.load_format, "value", None) or load.load_format)


def name_weights(model: Any, load: Any, config: Mapping[str, Any]) -> str:
    """The bytes of the weights that vLLM reads for a model.

    Args:
        model: vLLM's configuration of the model.
        load: And of how it is loaded.
        config: The model's own configuration.

    Raises:
        Unnameable: Not sure which bytes these are.
    """
    load_format = load_format_of(load)
    _check_loader(load, load_format)
    _check_code(model)
    if getattr(model, "model_weights", None):
        raise Unnameable("the weights are kept apart from the model")
    elsewhere = sorted(name for name in _ELSEWHERE if config.get(name))
    if elsewhere:
        raise Unnameable(f"{', '.join(elsewhere)} in the model's configuration names other files")
    folder = find_folder(model.model, model.revision, getattr(load, "download_dir", None))
    digest = None
    try:
        digest = folder and digest_weights(folder, load_format)
    except OSError as error:
        raise Unnameable(f"the weights can't be read: {error}") from error
    if not digest:
        raise Unnameable(f"it has no weights of load format {load_format!r} on this machine")
    return digest


def _check_loader(load: Any, load_format: str) -> None:
    if not is_known(load_format):
        raise Unnameable(f"load format {load_format!r} does not tell which files it reads")
    extra = getattr(load, "model_loader_extra_config", None) or {}
    if not isinstance(extra, Mapping) or set(extra) - _HARMLESS:
        raise Unnameable(f"model_loader_extra_config {extra!r} is not known")
    # Only who has imported it can have put a loader of its own in the place of vLLM's.
    module = sys.modules.get("vllm.model_executor.model_loader")
    loaders = getattr(module, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    if load_format in loaders and not loaders[load_format].__module__.startswith("vllm."):
        raise Unnameable(f"load format {load_format!r} is a plugin's")


def _check_code(model: Any) -> None:
    if getattr(model, "model_class_overrides", None):
        raise Unnameable("model_class_overrides brings code of its own")
    if getattr(model, "trust_remote_code", False):
        # Without this vLLM takes its own code for the model's name, whatever the model brings.
        is_foreign = getattr(model, "using_transformers_backend", None)
        if is_foreign is not None and is_foreign():
            raise Unnameable("trust_remote_code lets the model bring code of its own")
    architecture = getattr(model, "architecture", None)
    module = sys.modules.get("vllm.model_executor.models.registry")
    if architecture is None or module is None:
        return
    if str(architecture).startswith("Cosmos3"):
        raise Unnameable(f"{architecture} reads weights in folders of their own")
    entry = module.ModelRegistry.models.get(architecture)
    source = getattr(entry, "module_name", None) or getattr(
        getattr(entry, "model_cls", None), "__module__", ""
    )
    if not str(source).startswith("vllm."):
        raise Unnameable(f"{architecture} is a plugin's model")
