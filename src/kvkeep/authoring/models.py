"""A model of transformers, ready to compute KV, with what can be said of whose KV that is."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from kvkeep.authoring.identity import identity_of_model
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.models import resolve_model

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Author:
    """A model that computes KV, its tokenizer, and its name."""

    name: str
    """As its user calls it; the manifest says so."""
    model: Any
    tokenizer: Any
    device: str
    dtype: str
    """In which an engine keeps this model's KV; the model itself may compute in a wider one."""
    identity: dict[str, str]
    """As an engine with its own settings says it; empty where that can't be known."""

    @property
    def tokens_max(self) -> int:
        """Tokens of a request, its document included."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 24)


def check_supported(model: Any) -> None:
    """Refuse a model whose layers don't all keep keys and values of every token.

    Raises:
        InputError: One sentence that names what it does instead.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    if kinds != {"full_attention"} or (has_window and not hasattr(config, "layer_types")):
        raise InputError(
            f"the model {model.config.model_type} has layers that don't attend to every token "
            f"({', '.join(sorted(kinds)) if kinds != {'full_attention'} else 'sliding window'}): "
            "such models have no cartridges"
        )


def choose_device(named: str) -> str:
    """``cuda`` if that is there and nothing else was asked for.

    Raises:
        InputError: The named one is not there.
    """
    has_gpu = bool(torch.cuda.is_available())
    if named == "auto":
        return "cuda" if has_gpu else "cpu"
    if named == "cuda" and not has_gpu:
        raise InputError("torch sees no GPU here: leave out --device, or name cpu")
    return named


def load_author(
    name: str, *, device: str = "auto", dtype: str = "auto", computes_in: str = ""
) -> Author:
    """Load a model and its tokenizer.

    Args:
        name: ``smollm2``, a folder, or a Hugging Face id.
        device: ``cpu``, ``cuda``, or ``auto``.
        dtype: Of the KV; ``auto``: the model's own, as engines choose.
        computes_in: Data type of the model's own weights here; empty: that of the KV.

    Raises:
        InputError: There is no such model or device, or transformers can't open it.
        UnavailableError: It could not be converted.
    """
    device = choose_device(device)
    location = resolve_model(name).location
    config = _config(location, name)
    chosen = _own_dtype(config) if dtype == "auto" else dtype
    # Its bars and advice would stand between a command's own lines.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            location, dtype=getattr(torch, computes_in or chosen)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(_not_opened(name, error)) from error
    except (RuntimeError, MemoryError) as error:
        raise UnavailableError(f"model {name} could not be loaded ({_line(error)})") from error
    check_supported(model)
    model.to(device).eval().requires_grad_(False)
    return Author(
        name=name,
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=chosen,
        identity=identity_of_model(location, config, chosen),
    )


def _config(location: str, name: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(location)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_not_opened(name, error)) from error


def _own_dtype(config: Any) -> str:
    """As engines choose it (vllm 0.32, config/model.py, _resolve_auto_dtype)."""
    said = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if said == "float32":
        return "bfloat16"
    if said not in DTYPES:
        raise InputError(f"the model is in {said}: name --dtype, one of {', '.join(DTYPES)}")
    return said


def _not_opened(name: str, error: BaseException) -> str:
    return f"model {name} can't be opened by transformers ({_line(error)}): name another"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
