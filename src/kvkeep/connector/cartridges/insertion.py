"""In vLLM's front-end: requests that name a cartridge are looked at before they reach the engine.

What can't be served is refused there, with a sentence that the client gets (HTTP 400), and a
cartridge that is to stand in front of a prompt gets its tokens there. The engine believes none of
this: its scheduler side compares again, with files that were checked byte by byte.

vLLM has no hook for it, so ``InputProcessor.process_inputs`` is wrapped: every prompt passes it,
rendered, of whatever API (vllm 0.26 to 0.33, v1/engine/input_processor.py).
"""

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.cartridges.file_format import read_head
from kvkeep.cartridges.registry import Entry, Registry
from kvkeep.cartridges.store.claims import (
    INSERTED,
    MODE,
    Asked,
    claim,
    find_asked,
    mode_of,
    tokens_to_insert,
)
from kvkeep.connector import compat
from kvkeep.connector.settings import ConnectorSettings, load_settings
from kvkeep.model.errors import InputError, KvkeepError, RefusedError

log = logging.getLogger(__name__)

PARAMS = "kv_transfer_params"
CONNECTOR = "KvkeepConnector"
KNOWN_MAX = 256
"""Cartridges whose token ids are remembered."""

_MARK = "_kvkeep_wraps"


def install() -> None:
    """Wrap vLLM's input processor; safe to call again."""
    processor = compat.input_processor()
    if processor is None:
        log.warning("kvkeep: this vLLM has no input processor: cartridges can't be put before "
                    "prompts")  # fmt: skip
        return
    original: Callable[..., Any] = processor.process_inputs
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def prepared(self: Any, request_id: str, prompt: Any, params: Any, *more: Any,
                 **named: Any) -> Any:  # fmt: skip
        if _names_cartridge(params):
            prompt, params = prepare(self.vllm_config, prompt, params, named.get("lora_request"))
        return original(self, request_id, prompt, params, *more, **named)

    setattr(prepared, _MARK, original)
    processor.process_inputs = prepared


def _names_cartridge(params: Any) -> bool:
    extra_args = getattr(params, "extra_args", None)
    named = extra_args.get(PARAMS) if isinstance(extra_args, Mapping) else None
    return isinstance(named, Mapping) and named.get("cartridge_id") is not None


def prepare(
    vllm_config: Any, prompt: Any, params: Any, lora_request: Any = None
) -> tuple[Any, Any]:
    """A request as the engine gets it.

    Args:
        vllm_config: The engine's.
        prompt: As vLLM has rendered it.
        params: vLLM's sampling parameters; not changed.
        lora_request: The adapter it is for, if any.

    Returns:
        Prompt and parameters, with the cartridge's tokens where they belong in front.

    Raises:
        VLLMValidationError: One sentence for the client: vLLM answers 400.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        # Another connector's affair, or a parent's that has children of its own.
        return prompt, params
    try:
        settings = load_settings(transfer.kv_connector_extra_config)
        desk = _desk_of(settings.library_folder)
        return desk.prepare(vllm_config, settings, prompt, params, lora_request)
    except KvkeepError as error:
        raise compat.client_error(str(error)) from error


class FrontDesk:
    """One registry, as a front-end asks it: quickly, on its event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._registry: Registry | None = None
        self._ids: OrderedDict[str, npt.NDArray[np.int32]] = OrderedDict()

    def prepare(
        self,
        vllm_config: Any,
        settings: ConnectorSettings,
        prompt: Any,
        params: Any,
        lora_request: Any,
    ) -> tuple[Any, Any]:
        """See `prepare`.

        Raises:
            InputError, RefusedError, CorruptDataError, UnavailableError: One sentence.
        """
        named = params.extra_args[PARAMS]
        asked = find_asked(named)
        assert asked is not None
        if not settings.serves_cartridges:
            raise RefusedError(
                "this engine serves no cartridges: set cartridge_library or cartridges in its "
                "kv_connector_extra_config"
            )
        if lora_request is not None:
            raise RefusedError(
                "a cartridge holds KV of the model itself: leave the LoRA adapter or it out"
            )
        token_ids = _token_ids_of(prompt)
        entry = self._find(asked.cartridge_id)
        known = self._known_ids(entry)
        block_tokens = int(vllm_config.cache_config.block_size)
        mode = mode_of(asked, entry.manifest)
        if mode == "prepend":
            _check_prepend(settings, params)
            if not token_ids:
                raise InputError("the prompt is empty behind the cartridge: ask something")
            if not asked.num_inserted:
                ids = None if known is None else known.tolist()
                inserted = tokens_to_insert(entry.manifest, ids, block_tokens)
                return _with_tokens(prompt, inserted), _with_params(params, len(inserted))
        own = Asked(asked.cartridge_id, mode, asked.num_inserted)
        claim(own, entry.manifest, known, token_ids, block_tokens)
        return prompt, params

    def close(self) -> None:
        """Give the registry back; the next question opens it anew."""
        with self._lock:
            if self._registry is not None:
                self._registry.close()
                self._registry = None

    def _find(self, cartridge_id: str) -> Entry:
        with self._lock:
            if self._registry is None:
                self._registry = Registry(self._folder)
            entry = self._registry.get(cartridge_id)
        if entry is None:
            raise InputError(
                f"there is no cartridge {cartridge_id!r}: see kvkeep cartridge ls, and register it"
            )
        return entry

    def _known_ids(self, entry: Entry) -> npt.NDArray[np.int32] | None:
        """Token ids as the file has them, which nobody has checked: for comparing only."""
        if not entry.manifest.has_token_ids:
            return None
        with self._lock:
            known = self._ids.get(entry.digest)
            if known is None:
                head = read_head(entry.path)
                num_bytes = 4 * head.manifest.num_tokens
                # They are the last tensor of the file.
                with entry.path.open("rb") as file:
                    file.seek(head.file_bytes - num_bytes)
                    known = np.frombuffer(file.read(num_bytes), dtype="<i4").astype(np.int32)
                self._ids[entry.digest] = known
                while len(self._ids) > KNOWN_MAX:
                    self._ids.popitem(last=False)
        return known


def _check_prepend(settings: ConnectorSettings, params: Any) -> None:
    if not settings.cartridges:
        raise RefusedError(
            "this engine puts no cartridge in front of prompts: set cartridges: true in its "
            "kv_connector_extra_config, and kv_load_failure_policy fail"
        )
    if getattr(params, "prompt_logprobs", None) is not None:
        raise RefusedError("logprobs of a cartridge's own tokens can't be had: ask for none")


def _token_ids_of(prompt: Any) -> Sequence[int]:
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    if ids is None or prompt.get("type") != "token":
        raise InputError("a cartridge goes with prompts of whole text only")
    return list(ids)


def _with_tokens(prompt: Any, inserted: Sequence[int]) -> dict[str, Any]:
    return {**prompt, "prompt_token_ids": [*inserted, *prompt["prompt_token_ids"]]}


def _with_params(params: Any, num_inserted: int) -> Any:
    """The same parameters, saying that the cartridge's tokens are there."""
    own = params.clone()
    named = {**params.extra_args[PARAMS], MODE: "prepend", INSERTED: num_inserted}
    own.extra_args = {**params.extra_args, PARAMS: named}
    return own


@functools.lru_cache(maxsize=16)
def _desk_of(folder: Path) -> FrontDesk:
    return FrontDesk(folder)
