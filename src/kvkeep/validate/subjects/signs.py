"""Looks at a subject: at its engine in a stack file, or at an address."""

import json
from collections.abc import Mapping
from typing import Any

from kvkeep.model.errors import UnavailableError
from kvkeep.stack.engines import CONNECTOR_NAME, NIXL_NAME
from kvkeep.stack.spec import EngineSpec
from kvkeep.validate.load import Endpoint
from kvkeep.validate.subjects.base import Signs

_OWNERS = {"vllm": "vllm", "tensorrt_llm": "trtllm"}
"""Program by what it says of the owner of its models (vllm 0.32, entrypoints/openai; TensorRT-LLM,
tensorrt_llm/serve/openai_protocol.py)."""
_WORDS = {"kvkeep": (CONNECTOR_NAME,), "nixl": (NIXL_NAME,), "none": ()}
SERVER_INFO = "/server_info?config_format=json"


def signs_in_file(engine: EngineSpec) -> Signs | None:
    """What a stack file says of an engine that it starts; None for one that runs already."""
    if engine.url is not None:
        return None
    connector = engine.connector
    names = _WORDS[connector] if isinstance(connector, str) else connector_names(connector)
    return Signs("trtllm" if engine.server == "trtllm" else "vllm", names)


async def look(endpoint: Endpoint, told: Signs | None = None) -> Signs:
    """Ask a server what it is; what it does not say stays unknown.

    Args:
        endpoint: The engine.
        told: What is known of it from a stack file, which saves vLLM seconds of looking for it.
    """
    version = _text(await _json_or_none(endpoint, "/version"), "version")
    if told is not None:
        return Signs(told.program, told.connectors, version)
    listed = await _json_or_none(endpoint, "/v1/models")
    models = listed.get("data") if isinstance(listed, dict) else None
    owner = _text(models[0], "owned_by") if isinstance(models, list) and models else ""
    program = _OWNERS.get(owner, "")
    if program != "vllm":
        return Signs(program, None, version)
    info = await _json_or_none(endpoint, SERVER_INFO)
    return Signs(program, connectors_in(info), version)


def connectors_in(info: Any) -> tuple[str, ...] | None:
    """Names of the connectors out of vLLM's ``/server_info``; None where that does not say."""
    config = info.get("vllm_config") if isinstance(info, dict) else None
    if not isinstance(config, dict) or "kv_transfer_config" not in config:
        return None
    transfer = config["kv_transfer_config"]
    return connector_names(transfer) if isinstance(transfer, dict) else ()


def connector_names(transfer: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a kv-transfer-config's connector and of those inside it."""
    name = transfer.get("kv_connector")
    extra = transfer.get("kv_connector_extra_config")
    inner = extra.get("connectors") if isinstance(extra, dict) else None
    names = [str(name)] if name else []
    for each in inner if isinstance(inner, list) else ():
        if isinstance(each, dict):
            names += connector_names(each)
    return tuple(names)


async def _json_or_none(endpoint: Endpoint, path: str) -> Any:
    try:
        return await endpoint.get_json(path)
    except (UnavailableError, json.JSONDecodeError):
        return None


def _text(value: Any, name: str) -> str:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""
