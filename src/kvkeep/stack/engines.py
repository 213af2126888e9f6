"""Command lines and environments of what a stack starts: the daemon, vLLM, TensorRT-LLM.

Pure: nothing is started here. The command line of ``trtllm-serve`` follows its documentation and
is unit tested, but has not been run: it needs a GPU and its own installation.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

import kvkeep
from kvkeep.daemon.settings import ENVIRONMENT_PREFIX, DaemonSettings
from kvkeep.model.errors import InputError
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.settings import ENVIRONMENT_PREFIX as ROUTER_ENVIRONMENT_PREFIX
from kvkeep.stack.machine import HOST, compute_cpus, kv_cache_bytes
from kvkeep.stack.models import Model
from kvkeep.stack.placement.assign import VISIBLE
from kvkeep.stack.servers.named import TRTLLM_OPTIONS
from kvkeep.stack.spec import EngineSpec, StackSpec
from kvkeep.tiers.mooncake.listening import listening_environment

LOOPBACK_ENVIRONMENT: Mapping[str, str] = {
    # Each of these components would otherwise take the address of the machine's first network.
    "VLLM_HOST_IP": HOST,
    "GLOO_SOCKET_IFNAME": "lo",
    "UCX_NET_DEVICES": "lo",
    "UCX_TLS": "tcp,self,sysv,posix,cma",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
    "MC_TCP_BIND_ADDRESS": HOST,
}
TRTLLM = "trtllm-serve"
CONNECTOR_NAME = "KvkeepConnector"
CONNECTOR_MODULE = "kvkeep.connector.plugin"
NIXL_NAME = "NixlConnector"
NIXL_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "serve": "kv_both"}


class Launch(msgspec.Struct, frozen=True):
    """What starts one process."""

    command: list[str]
    environment: dict[str, str]
    files: dict[str, str] = {}
    """Text by name of files that the command reads, in the folder it runs in."""
    shares_port: bool = False
    """Whether the program is known to set SO_REUSEADDR, so that its port may be held for it until
    it listens (see `kvkeep.stack.servers.ports`)."""


class Placement(msgspec.Struct, frozen=True):
    """What an engine is told beside its own fields."""

    spec: StackSpec
    model: Model
    port: int
    socket: str
    """The daemon's control socket; empty where there is none."""
    gpu: bool = False
    gpus: tuple[str, ...] = ()
    """GPUs that it sees and no others; empty: all."""
    cores: list[int] | None = None
    """Cores that are its share, where its fields name none; None: all."""
    side_channel_port: int = 0
    """Where NixlConnector tells others of its memory."""
    events: EngineEvents | None = None
    """Where the router hears of its blocks; None: it publishes nothing."""


def launch_router(values: dict[str, Any]) -> Launch:
    """Start the router with every setting in a file: the environment has been heard already."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ROUTER_ENVIRONMENT_PREFIX)
    }
    return Launch(
        command=[sys.executable, "-m", "kvkeep", "route", "--config", "router.yaml"],
        environment=_with_kvkeep(environment),
        files={"router.yaml": json.dumps(values, indent=2) + "\n"},  # JSON is YAML
    )


def launch_daemon(
    spec: StackSpec,
    *,
    metrics_port: int | None = None,
    more_environment: Mapping[str, str] | None = None,
) -> Launch:
    """Start the daemon with every setting in a file: the environment has been heard already.

    Args:
        spec: Of the stack.
        metrics_port: Which it must take, or None.
        more_environment: What it needs to use the servers of its tiers.
    """
    settings = msgspec.to_builtins(spec.daemon_settings(metrics_port=metrics_port))
    own = {ENVIRONMENT_PREFIX + name.upper() for name in DaemonSettings.__struct_fields__}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return Launch(
        command=[sys.executable, "-m", "kvkeep", "daemon", "--config", "daemon.yaml"],
        environment=_with_kvkeep({**environment, **(more_environment or {})}),
        files={"daemon.yaml": json.dumps(settings, indent=2) + "\n"},  # JSON is YAML
    )


def launch_engine(engine: EngineSpec, placement: Placement) -> Launch:
    """Start one engine with whichever program it takes.

    Raises:
        InputError: That program is not installed, or the cores can't be split.
    """
    if find_program(engine) == "trtllm":
        return _launch_trtllm(engine, placement)
    return _launch_vllm(engine, placement)


def find_program(engine: EngineSpec) -> str:
    """``vllm`` or ``trtllm``: as told, else whichever is installed.

    Raises:
        InputError: It is not installed.
    """
    if engine.python:  # that environment says itself what it lacks
        return "vllm" if engine.server == "auto" else engine.server
    installed = {
        "vllm": importlib.util.find_spec("vllm") is not None,
        "trtllm": shutil.which(TRTLLM) is not None,
    }
    wanted = [engine.server] if engine.server != "auto" else list(installed)
    for program in wanted:
        if installed[program]:
            return program
    name = {"vllm": "vLLM", "trtllm": "TensorRT-LLM (trtllm-serve)"}.get(engine.server, "vLLM")
    raise InputError(
        f"engine {engine.name}: {name} is not installed here; install it "
        "(`pip install kvkeep[vllm]` brings vLLM for CPUs), or name a running engine's url."
    )


def kv_transfer_config(
    engine: EngineSpec,
    socket: str,
    *,
    gpu: bool,
    announces: bool = False,
    lease_s: float | None = None,
) -> dict[str, Any] | None:
    """What vLLM is told about its connector; None for no connector.

    Args:
        engine: Of the stack.
        socket: The daemon's.
        gpu: Whether it runs on one.
        announces: Whether a router is to understand what the daemon keeps.
        lease_s: How long NixlConnector keeps blocks for a decode engine; None: as long as it likes.
    """
    if engine.connector == "none":
        return None
    if not isinstance(engine.connector, str):
        return engine.connector
    if engine.connector == "nixl":
        # Stock: any decode engine of the same vLLM can fetch from any prefill engine.
        return {
            "kv_connector": NIXL_NAME,
            "kv_role": NIXL_ROLES[engine.role],
            "kv_load_failure_policy": "fail" if gpu else "recompute",
            **({} if gpu else {"kv_buffer_device": "cpu"}),
            **({} if lease_s is None else _lease(lease_s)),
        }
    return {
        "kv_connector": CONNECTOR_NAME,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        # Recomputing placeholders of a cartridge would give fluent nonsense, and on a GPU vLLM
        # recomputes wrongly (see the connector's compat.py): there a failed load fails.
        "kv_load_failure_policy": "fail" if engine.cartridges or gpu else "recompute",
        "kv_connector_extra_config": {
            **engine.connector_settings,
            "socket": socket,
            **({"cartridges": True} if engine.cartridges else {}),
            **({"announce_blocks": True} if announces else {}),
        },
    }


def _lease(lease_s: float) -> dict[str, Any]:
    """What the router reckons with; vLLM counts whole seconds."""
    return {"kv_connector_extra_config": {"kv_lease_duration": max(1, int(lease_s))}}


def _launch_vllm(engine: EngineSpec, placement: Placement) -> Launch:
    spec = placement.spec
    flags: dict[str, object | None] = {
        "--model": placement.model.location,
        "--served-model-name": spec.served_name_of(engine),
        "--host": HOST,
        "--port": placement.port,
        "--block-size": engine.block_tokens,
        "--max-model-len": engine.max_model_len,
        "--max-num-seqs": engine.max_num_seqs,
        "--max-num-batched-tokens": engine.max_num_batched_tokens,
        "--dtype": engine.dtype,
        "--tensor-parallel-size": engine.tensor_parallel if engine.tensor_parallel > 1 else None,
        "--num-gpu-blocks-override": engine.num_gpu_blocks_override,
        "--kv-cache-memory-bytes": kv_cache_bytes(engine, gpu=placement.gpu),
    }
    announces = placement.events is not None and placement.events.pool != ""
    transfer = kv_transfer_config(
        engine,
        placement.socket,
        gpu=placement.gpu,
        announces=announces,
        lease_s=None if spec.router is None else spec.router.handoff.get("offer_lease_s"),
    )
    if transfer is not None:
        flags["--kv-transfer-config"] = json.dumps(transfer)
    if placement.events is not None:
        flags["--kv-events-config"] = json.dumps(_kv_events_config(placement.events))
    command = [engine.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for flag, value in flags.items():
        if value is not None:
            command += [flag, str(value)]
    command.append("--enable-prompt-tokens-details")
    if engine.eager:
        command.append("--enforce-eager")
    return Launch(
        command=[*command, *engine.args],
        environment=_vllm_environment(engine, placement),
        files=_files_of(engine),
        shares_port=True,  # vllm 0.32, entrypoints/launchers/launcher.py
    )


def _files_of(engine: EngineSpec) -> dict[str, str]:
    return {
        name: text if isinstance(text, str) else json.dumps(text, indent=2) + "\n"
        for name, text in engine.files.items()
    }


def _kv_events_config(events: EngineEvents) -> dict[str, Any]:
    """What vLLM is told of its events: it connects to the router, which listens on loopback.

    The other way round, vLLM would listen on every interface (vllm 0.32, distributed/kv_events.py).
    """
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": events.publish,
        "replay_endpoint": events.replay,
    }


def _vllm_environment(engine: EngineSpec, placement: Placement) -> dict[str, str]:
    own = {
        **LOOPBACK_ENVIRONMENT,
        # For POST /reset_prefix_cache; the address is loopback.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if placement.model.is_local:
        own["HF_HUB_OFFLINE"] = "1"
    if not placement.gpu:
        own["VLLM_CPU_OMP_THREADS_BIND"] = compute_cpus(engine, placement.cores)
    if placement.gpus:
        own[VISIBLE] = ",".join(placement.gpus)
    if "Mooncake" in json.dumps(engine.connector):
        # Its client would listen on every address of the host (docs/decisions/0022).
        own |= listening_environment(HOST)
    if engine.python:
        programs = (str(Path(engine.python).parent), os.environ.get("PATH", ""))
        own["PATH"] = os.pathsep.join(filter(None, programs))
    if placement.side_channel_port:
        own["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(placement.side_channel_port)
    # On a CPU this variable, whole GiB only, would win over --kv-cache-memory-bytes
    # (vllm 0.32, platforms/cpu.py).
    environment = {name: v for name, v in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    return _with_kvkeep({**environment, **own, **engine.env})


def _launch_trtllm(engine: EngineSpec, placement: Placement) -> Launch:
    """Start TensorRT-LLM, which serves a model under the name of its folder or id.

    Source: the documentation of trtllm-serve, release 1.1.
    """
    flags: dict[str, object | None] = {
        "--host": HOST,
        "--port": placement.port,
        "--max_seq_len": engine.max_model_len,
        "--max_batch_size": engine.max_num_seqs,
        "--max_num_tokens": engine.max_num_batched_tokens,
        "--tp_size": engine.tensor_parallel if engine.tensor_parallel > 1 else None,
    }
    cache: dict[str, object] = {
        "enable_block_reuse": True,
        "tokens_per_block": engine.block_tokens,
    }
    if engine.num_gpu_blocks_override is not None:
        cache["max_tokens"] = engine.num_gpu_blocks_override * engine.block_tokens
    options: dict[str, object] = {"kv_cache_config": cache}
    if engine.dtype is not None:
        options["dtype"] = engine.dtype
    if isinstance(engine.connector, dict):
        options["kv_connector_config"] = engine.connector
    program = str(Path(engine.python).parent / TRTLLM) if engine.python else TRTLLM
    files = _files_of(engine)
    if files.pop(TRTLLM_OPTIONS, None) is not None:
        options = _merged(options, engine.files[TRTLLM_OPTIONS])
    command = [program, placement.model.location]
    for flag, value in flags.items():
        if value is not None:
            command += [flag, str(value)]
    file = f"{engine.name}.trtllm.yaml"
    offline = {"HF_HUB_OFFLINE": "1"} if placement.model.is_local else {}
    gpus = {VISIBLE: ",".join(placement.gpus)} if placement.gpus else {}
    return Launch(
        command=[*command, "--extra_llm_api_options", file, *engine.args],
        environment={**os.environ, **LOOPBACK_ENVIRONMENT, **offline, **gpus, **engine.env},
        files={**files, file: json.dumps(options, indent=2) + "\n"},
    )


def _merged(options: dict[str, object], more: Any) -> dict[str, object]:
    """Options with others over them, mapping by mapping."""
    found = dict(options)
    for name, new in more.items():
        old, value = found.get(name), new
        if isinstance(old, dict) and isinstance(value, dict):
            value = {**old, **value}
        found[name] = value
    return found


def _with_kvkeep(environment: Mapping[str, str]) -> dict[str, str]:
    """Make kvkeep importable in the child, also where it runs from a folder of sources."""
    found = dict(environment)
    try:
        importlib.metadata.distribution("kvkeep")
    except importlib.metadata.PackageNotFoundError:
        sources = str(Path(kvkeep.__file__).parent.parent)
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [sources, found.get("PYTHONPATH")]))
    return found
