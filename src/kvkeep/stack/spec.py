"""What a stack file may say, and what each field means; docs/stack-file.md is the user's view.

Values and checks that need nothing but the values. What depends on the machine (memory, cores,
ports) is checked in `kvkeep.stack.machine`; who wins between flag, environment and file is decided
in `kvkeep.stack.precedence`.
"""

import itertools
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs

from kvkeep.connector.settings import load_settings as load_connector_settings
from kvkeep.daemon.settings import (
    EVENTS_PATH_BYTES_MAX,
    DaemonSettings,
    runtime_folder,
)
from kvkeep.daemon.settings import load_settings as load_daemon_settings
from kvkeep.model.errors import InputError
from kvkeep.router.settings import Port
from kvkeep.stack.models import DEFAULT_MODEL
from kvkeep.stack.routing.spec import RouterSpec, check_router, whole_router_paths
from kvkeep.stack.servers.named import ServerSpec, check_servers, named_server_ports
from kvkeep.stack.servers.started import check_started, client_settings, find_started

ENGINES_MAX = 64
SERVERS_MAX = 16
BLOCK_TOKENS_UNIT = 32
"""vLLM's CPU build and its fastest GPU kernels take blocks in multiples of this (vllm 0.32,
platforms/cpu.py), and kvkeep's hash chain is compared across engines in the same unit."""
START_TIMEOUT_S = 300.0

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

# What engines.py sets from fields: given a second time it would silently win or be refused late.
_DATA_PARALLEL = ("--data-parallel-size", "-dp")
_OWN_FLAGS = {
    "--model": "the stack's model",
    "--served-model-name": "the stack's served_model_name",
    "--host": "nothing: engines listen on 127.0.0.1",
    "--port": "port",
    "--block-size": "block_tokens",
    "--max-model-len": "max_model_len",
    "--max-num-seqs": "max_num_seqs",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--dtype": "dtype",
    "--tensor-parallel-size": "tensor_parallel",
    "--num-gpu-blocks-override": "num_gpu_blocks_override",
    "--kv-cache-memory-bytes": "kv_cache_bytes",
    "--kv-transfer-config": "connector",
}


class DaemonSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kvkeep daemon of a stack."""

    enabled: bool = True
    """False: no daemon is started; engines use the one at ``socket``, or none."""
    pool_bytes: Annotated[int, msgspec.Meta(ge=1 << 24, le=1 << 46)] = 2 << 30
    """Size of the shared-memory pool in bytes; the file may say ``2GiB``."""
    pool_blocks: Count | None = None
    """Size of the pool in blocks of the first engine instead; needs a local model."""
    socket: str = ""
    """Path of the control socket; empty: one in the stack's state folder."""
    metrics_port: Port = 0
    """TCP port on 127.0.0.1 for metrics and status; 0 takes a free one."""
    keep_pool: bool = False
    """Whether the pool stays in memory when the stack goes down, for the next ``up``."""
    tiers: list[dict[str, Any]] = []
    """Where blocks go below the pool, the fastest first; docs/operations.md has their fields. The
    stack starts the server of one that says ``start: true``: see below."""
    settings: dict[str, Any] = {}
    """Any further setting of the daemon, passed on."""


class EngineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine of a stack: started here, or running already where ``url`` is given."""

    name: Name
    """What the stack calls it; letters, digits, dots, dashes and underscores."""
    url: str | None = None
    """Address of an engine that already runs; then no field below is used."""
    server: Literal["auto", "vllm", "trtllm"] = "auto"
    """Program to start; ``auto`` takes the one that is installed."""
    python: str = ""
    """Interpreter of another environment that has vLLM, such as one with other packages; left out:
    the one kvkeep runs in."""
    port: Port = 0
    """TCP port on 127.0.0.1; 0 takes a free one."""
    model: str = ""
    """Its model, if that is not the stack's; those that share a daemon need models of one shape."""
    served_model_name: str = ""
    """Name clients ask for, if that is not the stack's; empty: ``model`` as it was given."""
    role: Literal["serve", "prefill", "decode"] = "serve"
    """Which part of a request it does; ``prefill`` and ``decode`` need a ``router``."""
    on_demand: bool = False
    """True: it starts at the first request for its model, which needs a ``router``."""
    idle_stop_s: Annotated[float, msgspec.Meta(ge=0, le=31_536_000)] = 900.0
    """An engine on demand that has had nothing to do for so long is stopped; 0: never."""
    start_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] | None = None
    """Longest wait for it to be ready, in seconds; left out: as the stack says."""
    start_wait_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 120.0
    """A request waits for its start so long at most, in seconds; then 503 with Retry-After."""
    gpus: Annotated[int, msgspec.Meta(ge=0, le=64)] | list[int | str] | None = None
    """How many GPUs it gets for itself, or which, such as ``[0]``; left out: one for each rank."""
    kv_cache_bytes: Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 46)] | None = None
    """Memory for the engine's own KV cache in bytes; left out: 1 GiB on a CPU, the engine's choice
    on a GPU."""
    cpus: str | list[int] | None = None
    """Cores of its compute threads, such as ``[0, 1]`` or ``0-1``, with ``|`` between
    tensor-parallel ranks; left out: all, with a ``router`` an equal share."""
    block_tokens: Count = 32
    """Tokens per block; a multiple of 32."""
    max_model_len: Count | None = None
    """Longest sequence, in tokens."""
    max_num_seqs: Count | None = None
    """Sequences computed at once."""
    max_num_batched_tokens: Count | None = None
    """Tokens computed in one step."""
    dtype: str | None = None
    """Data type of weights and KV; left out: as the model says."""
    tensor_parallel: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Ranks that share the model."""
    num_gpu_blocks_override: Count | None = None
    """Blocks of the engine's own KV cache, whatever its memory would hold."""
    eager: bool = True
    """False compiles the model at start: slower to start, and needs a C++ compiler."""
    connector: Literal["kvkeep", "nixl", "none"] | dict[str, Any] = "kvkeep"
    """``kvkeep``, ``nixl`` (vLLM's own NixlConnector, for engines with a ``role``), ``none``, or a
    whole kv-transfer-config."""
    connector_settings: dict[str, Any] = {}
    """Further settings of kvkeep's connector."""
    cartridges: bool = False
    """Serves prepended cartridges: a load that fails must fail the request."""
    args: list[str] = []
    """Further arguments of the engine's program."""
    env: dict[str, str] = {}
    """Further environment variables of the engine; they win."""
    files: dict[str, Any] = {}
    """Files that it reads, by name, in the folder it runs in: text, or values written as JSON."""

    @property
    def uses_kvkeep(self) -> bool:
        """Whether this stack gives the engine kvkeep's connector."""
        return self.url is None and self.connector == "kvkeep"

    @property
    def num_data_parallel(self) -> int:
        """Ranks with caches of their own that ``args`` ask for; 1 if they ask for none."""
        words = [word for arg in self.args for word in arg.split("=", 1)]
        for flag, value in itertools.pairwise(words):
            if flag.replace("_", "-") in _DATA_PARALLEL and value.isdecimal():
                return max(1, int(value))
        return 1


class StackSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stack: daemon and engines, with every default applied."""

    name: Name
    """By which `kvkeep wait` and `kvkeep down` find it; by default the file's name."""
    model: str = DEFAULT_MODEL
    """``smollm2``, a folder, or a Hugging Face id."""
    served_model_name: str = ""
    """Name clients ask for; empty: ``model`` as it was given."""
    state_dir: str = ""
    """Folder for logs, sockets and what ``down`` needs; empty: one in the user's state folder."""
    start_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = START_TIMEOUT_S
    """Longest wait for one process to be ready, in seconds."""
    exact: bool = False
    """Every step computes one block of one sequence, so that a hit is equal to the bit."""
    daemon: DaemonSpec = DaemonSpec()
    """The daemon; see below."""
    engines: Annotated[list[EngineSpec], msgspec.Meta(min_length=1, max_length=ENGINES_MAX)]
    """At least one engine; see below."""
    servers: Annotated[list[ServerSpec], msgspec.Meta(max_length=SERVERS_MAX)] = []
    """Programs that engines use, started before them; see below."""
    router: RouterSpec | None = None
    """One address for all engines; see below. Left out: clients ask the engines themselves."""
    check: dict[str, Any] = {}
    """Settings of ``kvkeep check`` for this stack; it checks them itself."""

    @property
    def state_path(self) -> Path:
        """Folder of this stack's logs and state, default applied."""
        return Path(self.state_dir).expanduser() if self.state_dir else default_state_dir(self.name)

    @property
    def model_name(self) -> str:
        """What clients send as ``model``."""
        return self.served_model_name or self.model

    def model_of(self, engine: EngineSpec) -> str:
        """What an engine computes with."""
        return engine.model or self.model

    def served_name_of(self, engine: EngineSpec) -> str:
        """What clients of an engine send as ``model``."""
        return engine.served_model_name or engine.model or self.model_name

    @property
    def models(self) -> list[str]:
        """Every model that an engine of this stack starts with, each once."""
        own = [self.model_of(engine) for engine in self.engines if engine.url is None]
        return list(dict.fromkeys(own or [self.model]))

    @property
    def socket_path(self) -> str:
        """The daemon's control socket, default applied."""
        if self.daemon.socket:
            return str(Path(self.daemon.socket).expanduser())
        return self._own_socket("daemon.sock", f"{self.name}.sock")

    @property
    def on_demand_socket_path(self) -> str:
        """Where the router asks for engines on demand."""
        return self._own_socket("on-demand.sock", f"{self.name}.on-demand.sock")

    @property
    def events_socket_path(self) -> str:
        """Where the router hears what the daemon keeps; empty where it does not ask."""
        if self.router is None or not self.router.events or not self.daemon.enabled:
            return ""
        named = self.daemon.settings.get("events_socket")
        return str(named or self._own_socket("events.sock", f"{self.name}.events.sock"))

    def pool_of(self, engine: EngineSpec) -> str:
        """Where a router hears of what an engine's daemon keeps; empty: nowhere."""
        path = self.events_socket_path if engine.uses_kvkeep else ""
        return f"ipc://{path}" if path else ""

    def _own_socket(self, name: str, name_elsewhere: str) -> str:
        path = str(self.state_path / name)
        if len(path.encode()) <= EVENTS_PATH_BYTES_MAX:
            return path
        return str(runtime_folder() / name_elsewhere)

    def daemon_settings(self, *, metrics_port: int | None = None) -> DaemonSettings:
        """What the daemon is told.

        Raises:
            InputError: ``daemon.settings`` holds something the daemon does not take.
        """
        port = self.daemon.metrics_port if metrics_port is None else metrics_port
        own = {
            "pool_bytes": self.daemon.pool_bytes,
            "socket": self.socket_path,
            "metrics_port": port,
            "tiers": [client_settings(tier) for tier in self.daemon.tiers],
        }
        for field in own.keys() & self.daemon.settings.keys():
            raise InputError(f"daemon.settings.{field}: write it as daemon.{field} instead.")
        try:
            heard = {"events_socket": path} if (path := self.events_socket_path) else {}
            return load_daemon_settings(None, {}, {**self.daemon.settings, **own, **heard})
        except InputError as error:
            raise InputError(f"daemon.settings: {error}") from error


def default_state_dir(name: str) -> Path:
    """Where the stack of this name keeps its state unless its file says otherwise."""
    return Path(platformdirs.user_state_dir("kvkeep")) / "stacks" / name


def make_exact(spec: StackSpec) -> StackSpec:
    """Give every engine the limits that ``exact`` stands for.

    Raises:
        InputError: A limit is given and is another.
    """
    if not spec.exact:
        return spec
    engines = []
    for idx, engine in enumerate(spec.engines):
        wanted = {"max_num_batched_tokens": engine.block_tokens, "max_num_seqs": 1}
        for field, value in wanted.items():
            given = getattr(engine, field)
            if given not in (None, value):
                raise InputError(
                    f"engines[{idx}].{field} = {given}: exact mode needs {value}; "
                    "leave it out, or set exact: false."
                )
        engines.append(msgspec.structs.replace(engine, **wanted))
    return msgspec.structs.replace(spec, engines=engines)


def with_whole_paths(spec: StackSpec) -> StackSpec:
    """The daemon and the engines run in the state folder, and must mean the user's paths."""
    socket, settings = spec.daemon.socket, dict(spec.daemon.settings)
    if pool := settings.get("pool"):
        settings["pool"] = os.path.abspath(os.path.expanduser(str(pool)))
    if socket:
        socket = os.path.abspath(os.path.expanduser(socket))
    daemon = msgspec.structs.replace(spec.daemon, socket=socket, settings=settings)
    router = None if spec.router is None else whole_router_paths(spec.router)
    engines = [
        msgspec.structs.replace(each, python=_whole_program(each.python)) for each in spec.engines
    ]
    servers = [
        msgspec.structs.replace(each, command=[_whole_program(each.command[0]), *each.command[1:]])
        for each in spec.servers
    ]
    return msgspec.structs.replace(
        spec, daemon=daemon, router=router, engines=engines, servers=servers
    )


def _whole_program(name: str) -> str:
    """A program that is named by a path; another is looked for where programs are."""
    return os.path.abspath(os.path.expanduser(name)) if "/" in name else name


def check_spec(spec: StackSpec) -> None:
    """Check what the types alone can't.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    _check_paths(spec)
    check_started(spec.daemon.tiers)
    spec.daemon_settings()
    _check_ports(spec)
    names: dict[str, int] = {}
    for idx, engine in enumerate(spec.engines):
        field = f"engines[{idx}]"
        if engine.name in names:
            raise InputError(
                f"{field}.name = {engine.name}: engines[{names[engine.name]}] has this name too; "
                "give each engine its own."
            )
        names[engine.name] = idx
        _check_engine(engine, field)
        _check_tier(spec, engine, field)
    _check_layouts(spec)
    check_servers(spec)
    check_router(spec)


def _check_ports(spec: StackSpec) -> None:
    fields: dict[int, str] = {}
    for field, port in named_ports(spec).items():
        if port in fields:
            raise InputError(
                f"{field} = {port}: {fields[port]} is the same; choose another, or 0 for a free "
                "one."
            )
        fields[port] = field


def named_ports(spec: StackSpec) -> dict[str, int]:
    """The ports that a stack file asks for, by field."""
    ports = {"daemon.metrics_port": spec.daemon.metrics_port if spec.daemon.enabled else 0}
    ports |= {f"engines[{idx}].port": engine.port for idx, engine in enumerate(spec.engines)}
    ports |= {
        f"daemon.tiers[{server.tier_idx}].port": server.port
        for server in find_started(spec.daemon.tiers)
    }
    ports |= named_server_ports(spec.servers)
    if spec.router is not None:
        ports |= {"router.port": spec.router.port, "router.admin_port": spec.router.admin_port}
    return {field: port for field, port in ports.items() if port}


def _check_paths(spec: StackSpec) -> None:
    for field, text in (("state_dir", spec.state_dir), ("daemon.socket", spec.daemon.socket)):
        is_nobodys = text.startswith("~") and os.path.expanduser(text) == text
        if is_nobodys or "\0" in text:
            raise InputError(f"{field} = {text!r}: there can be no such path; write another.")


def _check_engine(engine: EngineSpec, field: str) -> None:
    if engine.url is not None:
        if not re.fullmatch(r"https?://[^\s/]+/?", engine.url):
            raise InputError(
                f"{field}.url = {engine.url}: write an address such as http://127.0.0.1:8000."
            )
        if engine.port:
            raise InputError(f"{field}.port: leave it out, url already holds the port.")
        return
    if engine.python and "/" not in engine.python:
        raise InputError(
            f"{field}.python = {engine.python}: write a path, such as .venv-other/bin/python."
        )
    if engine.block_tokens % BLOCK_TOKENS_UNIT:
        raise InputError(
            f"{field}.block_tokens = {engine.block_tokens}: use a multiple of {BLOCK_TOKENS_UNIT}."
        )
    if engine.server == "trtllm" and engine.connector in ("kvkeep", "nixl"):
        raise InputError(
            f"{field}.connector = {engine.connector}: kvkeep has no connector for TensorRT-LLM; "
            "set connector: none, or server: vllm."
        )
    for argument in engine.args:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in _OWN_FLAGS:
            raise InputError(f"{field}.args has {flag}: the field for it is {_OWN_FLAGS[flag]}.")
    if engine.connector != "kvkeep" and engine.connector_settings:
        raise InputError(
            f"{field}.connector_settings: only connector: kvkeep has settings; leave them out."
        )
    _check_connector_settings(engine, field)


def _check_connector_settings(engine: EngineSpec, field: str) -> None:
    for name in ("socket", "cartridges"):
        if name in engine.connector_settings:
            place = "daemon.socket" if name == "socket" else f"{field}.cartridges"
            raise InputError(f"{field}.connector_settings.{name}: write it as {place} instead.")
    try:
        load_connector_settings({**engine.connector_settings, "socket": "unused"})
    except InputError as error:
        raise InputError(f"{field}.connector_settings: {error}") from error


def _check_tier(spec: StackSpec, engine: EngineSpec, field: str) -> None:
    if engine.uses_kvkeep and not spec.daemon.enabled and not spec.daemon.socket:
        raise InputError(
            f"{field}.connector = kvkeep: there is no tier to keep blocks in, for the daemon is "
            "disabled; set daemon.enabled: true, name the socket of a running daemon in "
            "daemon.socket, or set connector: none."
        )


def _check_layouts(spec: StackSpec) -> None:
    """Refuse engines that one pool can't serve; their daemon would, after a minute of starting."""
    sharing = [(idx, engine) for idx, engine in enumerate(spec.engines) if engine.uses_kvkeep]
    for (one, first), (other, engine) in itertools.product(sharing[:1], sharing[1:]):
        for name, mine, theirs in (
            ("block_tokens", engine.block_tokens, first.block_tokens),
            ("dtype", engine.dtype, first.dtype),
            ("connector_settings.kv_form", _kv_form(engine), _kv_form(first)),
        ):
            if mine != theirs:
                raise InputError(
                    f"engines[{other}].{name} = {mine}: engines[{one}] has {theirs}, and engines "
                    "of one daemon keep their blocks in one pool; give both the same, or another "
                    "stack."
                )


def _kv_form(engine: EngineSpec) -> str:
    return load_connector_settings({**engine.connector_settings, "socket": "unused"}).kv_form
