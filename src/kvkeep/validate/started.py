"""The stack that a check runs against: one that is up already, or one started for it.

Blocking; what was started is stopped when the ``with`` block ends, however it ends.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.machine import has_gpu
from kvkeep.stack.precedence import ENVIRONMENT as STACK_ENVIRONMENT
from kvkeep.stack.precedence import load_spec, make_spec
from kvkeep.stack.progress import Progress
from kvkeep.stack.record import StackRecord, read_record
from kvkeep.stack.spec import EngineSpec, StackSpec
from kvkeep.stack.supervisor import Stack
from kvkeep.validate.arms.lower_tiers import TierPlaces
from kvkeep.validate.settings import (
    DOCUMENTS,
    ENVIRONMENT,
    CheckSettings,
    Document,
    heard,
)
from kvkeep.validate.subject import SMALL_ENGINE_BLOCKS_MAX, Addresses
from kvkeep.validate.subjects.signs import signs_in_file
from kvkeep.validate.suite.base import Suite, Template

OWN_STACK_NAME = "check"
SPEC_FIELDS = {
    "model_id": "model",
    "server_port": "engines.0.port",
    "server_start_timeout_s": "start_timeout_s",
    "cpu_blocks": "daemon.pool_blocks",
    "cache_port": "daemon.metrics_port",
    "router_port": "router.port",
}
"""Fields of the stack file by the check's setting that shapes them."""
LOG_LINES = 50
"""Kept of each process's log."""
_SETTINGS = {"tensor_parallel": "tp_size", "block_tokens": "block_tokens"}
"""By an engine's field: what the settings of a role call it."""


@dataclass(frozen=True, slots=True)
class Started:
    """A stack that is ready."""

    addresses: Addresses
    restart: Callable[[], Awaitable[None]] | None
    """Restarts the engine under test; None where the stack is somebody else's."""
    last_lines: Callable[[], dict[str, list[str]]] = dict
    """The end of each process's log, by name; nothing for a stack of somebody else's."""


def spec_from_file(
    path: Path,
    flags: Mapping[str, Any],
    *,
    exact: bool | None,
    environ: Mapping[str, str] | None = None,
    documents: Sequence[Document] = DOCUMENTS,
    fields: Mapping[str, Any] | None = None,
) -> StackSpec:
    """Read a stack file; the environment is heard there too, and flags win.

    Args:
        path: The stack file.
        flags: The check's own, by setting; those that shape no stack are ignored.
        exact: What the flag says, or None to leave it to the file.
        environ: Variables that shape the stack; None: those that any stack hears.
        documents: Whose variables are heard.
        fields: Further fields of the stack, which win over all.

    Raises:
        InputError: Something in the file or a flag is wrong.
    """
    texts = {name: text for name, (_, text) in heard(environ or {}, documents).items()}
    overrides = {
        field: flags.get(name) if flags.get(name) is not None else texts.get(name)
        for name, field in SPEC_FIELDS.items()
    }
    if overrides["router.port"] is None:
        del overrides["router.port"]
    return load_spec(path, {**overrides, "exact": exact, **(fields or {})})


def template_from_file(path: Path, flags: Mapping[str, Any], **more: Any) -> Template:
    """Take a stack file as the template of several stacks.

    Args:
        path: The stack file.
        flags: The check's own, by setting.
        more: What else `spec_from_file` takes.

    Raises:
        InputError: Something in the file or a flag is wrong.
    """
    base = spec_from_file(path, flags, **more)

    def make(by_role: Mapping[str, Mapping[str, int]]) -> StackSpec:
        fields = {
            f"engines.{idx}.{field}": value
            for idx, engine in enumerate(base.engines)
            for field, value in by_role.get(engine.role, {}).items()
        }
        return spec_from_file(path, flags, **more, fields=fields)

    return make


def own_spec(
    settings: CheckSettings,
    environ: Mapping[str, str],
    *,
    exact: bool,
    suites: Sequence[Suite] = (),
) -> StackSpec:
    """A stack for a check that was told of none: as much of one as its suites need.

    One engine and a daemon; a baseline without a cache, a second engine behind a router, or pairs
    of prefill and decode engines, where a suite asks for them. Engines with a role bear no others
    beside them, so a pair is made only where all suites need one (`by_stack`).

    Raises:
        InputError: A setting is wrong.
    """
    values: dict[str, Any] = {
        "name": OWN_STACK_NAME,
        "start_timeout_s": settings.server_start_timeout_s,
        "exact": exact,
        "daemon": {},
        "engines": [{"name": "a", "port": settings.server_port or 0}],
    }
    if suites and all(suite.needs_pair for suite in suites):
        values["engines"] = _pair_engines(settings)
        values["router"] = {"port": settings.router_port or 0}
    elif any(suite.needs_router for suite in suites):
        values["engines"].append({"name": "b"})
        values["router"] = {"policy": "consistent_hash", "port": settings.router_port or 0}
    if any(suite.needs_baseline for suite in suites):
        baseline = {"name": "baseline", "connector": "none", "port": settings.baseline_port or 0}
        values["engines"].append(baseline)
    if any(suite.needs_sequences for suite in suites):
        values["daemon"]["settings"] = {"sequences": {}}
    if settings.cache_port is not None:
        values["daemon"]["metrics_port"] = settings.cache_port
    if settings.model_id is not None:
        values["model"] = settings.model_id
    if settings.cpu_blocks is not None:
        values["daemon"]["pool_blocks"] = settings.cpu_blocks
    # What the settings have settled already must not be overruled by the environment.
    settled = STACK_ENVIRONMENT.keys() & ENVIRONMENT.keys()
    rest = {name: value for name, value in environ.items() if name not in settled}
    return make_spec(values, environment=rest)


def by_stack(suites: Sequence[Suite]) -> list[tuple[Suite, ...]]:
    """Suites that share a stack of the check's own, those without a router first.

    Behind a router there are several engines, which would share the cores that others are timed on.
    """
    found: dict[tuple[bool, bool], list[Suite]] = {}
    for suite in suites:
        found.setdefault((suite.needs_pair, suite.needs_router), []).append(suite)
    return [tuple(found[needs]) for needs in sorted(found)]


def own_template(settings: CheckSettings, environ: Mapping[str, str], **more: Any) -> Template:
    """The template of the stacks that a check makes of its settings; see `own_spec`."""

    def make(by_role: Mapping[str, Mapping[str, int]]) -> StackSpec:
        sizes: dict[str, Any] = {
            f"{role}_{_SETTINGS[field]}": value
            for role, fields in by_role.items()
            for field, value in fields.items()
        }
        return own_spec(replace(settings, **sizes), environ, **more)

    return make


def _pair_engines(settings: CheckSettings) -> list[dict[str, Any]]:
    """Prefill engines first, then decode engines: in this order they get their GPUs."""
    engines: list[dict[str, Any]] = []
    for role, num, tp_size, block_tokens, port in (
        (
            "prefill",
            settings.num_prefill_instances,
            settings.prefill_tp_size,
            settings.prefill_block_tokens,
            settings.prefill_base_port,
        ),
        (
            "decode",
            settings.num_decode_instances,
            settings.decode_tp_size,
            settings.decode_block_tokens,
            settings.decode_base_port,
        ),
    ):
        for idx in range(num):
            engine: dict[str, Any] = {
                "name": f"{role}-{idx}",
                "role": role,
                "tensor_parallel": tp_size,
                "block_tokens": block_tokens,
                "port": port + idx if port else 0,
            }
            if settings.prefill_block_tokens != settings.decode_block_tokens:
                # One pool keeps blocks of one size; vLLM's own connector converts them.
                engine["connector"] = "nixl"
            if has_gpu():
                share = settings.gpu_memory_utilization
                engine["args"] = ["--gpu-memory-utilization", str(share)]
            if settings.test_flashinfer:
                engine["env"] = {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}
            engines.append(engine)
    return engines


@contextmanager
def started(
    spec: StackSpec, *, quiet: bool = False, with_router: bool = False
) -> Iterator[Started]:
    """Use the stack of this name if it is up, else start it and stop it at the end.

    Args:
        spec: The stack.
        quiet: Show no progress.
        with_router: Start its router too; engines with a role have one always.

    Raises:
        InputError: It can't run here, or did not start: there is nothing to check.
    """
    record = read_record(spec.state_path)
    if record is not None and record.state == "ready" and record.supervisor.is_alive():
        router = (record.router.url, record.router.admin_url) if record.router else None
        yield Started(_addresses(spec, _urls_of(record), _daemon_of(record), router), None)
        return
    kept = with_router or any(engine.role != "serve" for engine in spec.engines)
    with ExitStack() as held:
        try:
            ready = held.enter_context(
                started_anew(spec if kept else _without_router(spec), quiet=quiet)
            )
        except UnavailableError as error:
            raise InputError(str(error)) from error
        yield ready


@contextmanager
def started_anew(spec: StackSpec, *, quiet: bool = False) -> Iterator[Started]:
    """Start a stack with its router and stop it at the end; one that is up is not used.

    Args:
        spec: The stack.
        quiet: Show no progress.

    Raises:
        InputError: It can't run here; nothing was started.
        UnavailableError: It did not start; everything is stopped again.
    """
    spec = _all_running(spec)
    stack = Stack(spec, progress=Progress(quiet=quiet))
    # Nothing may come between the start and what stops it again.
    try:
        stack.start()
        yield _started(spec, stack)
    finally:
        stack.stop()


def _all_running(spec: StackSpec) -> StackSpec:
    """No engine waits for its first request."""
    engines = [msgspec.structs.replace(engine, on_demand=False) for engine in spec.engines]
    return msgspec.structs.replace(spec, engines=engines)


def _without_router(spec: StackSpec) -> StackSpec:
    """A check asks the engines themselves, so all of them run from its start."""
    return msgspec.structs.replace(_all_running(spec), router=None)


def _started(spec: StackSpec, stack: Stack) -> Started:
    urls = {name: engine.url for name, engine in stack.engines.items()}
    metrics_url = stack.daemon.metrics_url if stack.has_daemon else None
    engine = stack.engines[_big_engines(spec)[0].name]

    async def restart() -> None:
        await asyncio.to_thread(engine.restart)

    router = (stack.router.url, stack.router.admin_url) if stack.has_router else None
    addresses = replace(
        _addresses(spec, urls, metrics_url, router),
        tiers=_tier_places(stack.spec, stack.daemon.socket) if stack.has_daemon else None,
    )
    return Started(
        addresses,
        restart if engine.process is not None else None,
        lambda: last_lines_in(stack.folder),
    )


def last_lines_in(folder: Path) -> dict[str, list[str]]:
    """The end of each process's log, by name.

    Args:
        folder: Of the state of a stack, which may be down.
    """
    return {log.stem: _last_lines(log) for log in sorted(folder.glob("logs/*.log"))}


def _tier_places(spec: StackSpec, socket: str) -> TierPlaces:
    """The tiers of a stack's own daemon by where they keep their blocks."""
    tiers = spec.daemon_settings().named_tiers
    disks = tuple(tier.name for tier in tiers if tier.kind == "disk")
    return TierPlaces(socket, disks, tuple(t.name for t in tiers if t.name not in disks))


def _last_lines(log: Path) -> list[str]:
    try:
        return log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []


def _urls_of(record: StackRecord) -> dict[str, str]:
    return {engine.name: engine.url for engine in record.engines}


def _daemon_of(record: StackRecord) -> str | None:
    return record.daemon.metrics_url if record.daemon is not None else None


def _is_small(engine: EngineSpec) -> bool:
    return (engine.num_gpu_blocks_override or SMALL_ENGINE_BLOCKS_MAX + 1) <= (
        SMALL_ENGINE_BLOCKS_MAX
    )


def _is_baseline(engine: EngineSpec, spec: StackSpec) -> bool:
    """An engine without a cache beside one that has it."""
    return engine.connector == "none" and any(e.connector != "none" for e in spec.engines)


def _big_engines(spec: StackSpec) -> list[EngineSpec]:
    """Engines that the suite itself may run on: all, where all are small.

    Those that may not run, in a stack that is up already, come last; of a pair it is those that
    decode, because what they did not compute was handed over.
    """
    engines = sorted(spec.engines, key=lambda engine: engine.on_demand)
    big = [engine for engine in engines if not _is_small(engine)] or engines
    own = [engine for engine in big if not _is_baseline(engine, spec)]
    return [engine for engine in own if engine.role != "prefill"] or own


def _addresses(
    spec: StackSpec,
    urls: Mapping[str, str],
    daemon_url: str | None,
    router: tuple[str, str] | None = None,
) -> Addresses:
    """Give the engines their parts: the first big one is tested, the next is the other."""
    big = [urls[engine.name] for engine in _big_engines(spec)]
    small = [urls[engine.name] for engine in spec.engines if _is_small(engine)]
    baseline = [urls[engine.name] for engine in spec.engines if _is_baseline(engine, spec)]
    front, admin = router if router is not None and router[0] else (None, None)
    return Addresses(
        big[0],
        daemon_url or None,
        big[1] if len(big) > 1 else None,
        small[0] if small else None,
        baseline=baseline[0] if baseline else None,
        router=front,
        router_admin=admin,
        prefill=tuple(urls[e.name] for e in spec.engines if e.role == "prefill"),
        decode=tuple(urls[e.name] for e in spec.engines if e.role == "decode"),
        signs=signs_in_file(_big_engines(spec)[0]),
    )
