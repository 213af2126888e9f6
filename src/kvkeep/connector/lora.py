"""LoRA adapters named by their bytes, as long as it is sure which bytes the engine holds.

vLLM reads an adapter when it is first used, reads it again after it had to make room for others,
and again when it is told to load it in place. None of that is told to a connector. So an adapter
is named only while its files are as they were when it was first used; once they changed, its
requests are passed by until it gets another id.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvkeep.connector.identity import Unsupported
from kvkeep.connector.weights import digest_files, stamp_of

_CONFIG = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")

Stamp = list[list[str | int]]


@dataclass(frozen=True, slots=True)
class _Adapter:
    path: str
    stamp: Stamp
    identity: str


class Adapters:
    """The adapters this engine was asked for, by vLLM's number.

    Used by the engine core's one thread. Grows by one entry per number; vLLM keeps as much.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Adapter | None] = {}
        """None: it is not sure any more what the engine holds under this number."""

    def identify(self, request: Any) -> str:
        """What an adapter is.

        Args:
            request: vLLM's LoRARequest.

        Raises:
            Unsupported: It can't be read, or it is not sure what the engine holds.
        """
        number = int(request.lora_int_id)
        if number not in self._known:
            stamp = _stamp(request)
            identity = lora_identity(request)
            if _stamp(request) != stamp:
                raise Unsupported("a LoRA adapter changes while it is read")
            self._known[number] = _Adapter(str(request.lora_path), stamp, identity)
        if not self.is_sure(request):
            raise Unsupported(
                "a LoRA adapter was loaded in place, or its files changed since it was first used: "
                "load changed weights under another name"
            )
        known = self._known[number]
        assert known is not None
        return known.identity

    def is_sure(self, request: Any) -> bool:
        """Whether the engine still holds what was named under this number.

        What is not sure once never is again: other requests of that number know it too.

        Args:
            request: vLLM's LoRARequest; None of a request without an adapter.
        """
        if request is None:
            return True
        number = int(request.lora_int_id)
        known = self._known.get(number)
        try:
            is_same = (
                known is not None
                # The engine reads such an adapter anew in every step (vllm 0.26 to 0.33,
                # lora/worker_manager.py, add_adapter).
                and not getattr(request, "load_inplace", False)
                and (known.path, known.stamp) == (str(request.lora_path), _stamp(request))
            )
        except Unsupported:
            is_same = False
        if not is_same:
            self._known[number] = None
        return is_same


def lora_identity(request: Any) -> str:
    """What a request's LoRA adapter is: the bytes of its weights and of its configuration.

    Raises:
        Unsupported: The adapter can't be read; its KV must not be kept.
    """
    if getattr(request, "tensorizer_config_dict", None):
        raise Unsupported("LoRA adapters of tensorizer are not supported")
    path = Path(str(request.lora_path))
    try:
        # It holds the scale by which the weights count.
        config = (path / _CONFIG).read_bytes()
        # All of them: vLLM reads adapter_model of the first format there is, and older ones
        # further files beside it.
        files = sorted(file for file in path.iterdir() if file.suffix in _WEIGHTS)
        weights = digest_files(files)
    except OSError as error:
        raise Unsupported(f"a LoRA adapter can't be read: {error}") from error
    if not files:
        raise Unsupported("a LoRA adapter without weight files can't be identified")
    shape = " 3d" if getattr(request, "is_3d_lora_weight", False) else ""
    return f"{weights} {hashlib.blake2b(config, digest_size=16).hexdigest()}{shape}"


def _stamp(request: Any) -> Stamp:
    """What changes when a file of the adapter does.

    Raises:
        Unsupported: The adapter can't be read.
    """
    try:
        with os.scandir(str(request.lora_path)) as entries:
            return sorted(stamp_of(Path(entry.path), entry.stat()) for entry in entries)
    except OSError as error:
        raise Unsupported(f"a LoRA adapter can't be read: {error}") from error
