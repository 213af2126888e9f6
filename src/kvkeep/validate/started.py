"""The stack that a check runs against: one that is up already, or one started for it.

Blocking; what was started is stopped when the ``with`` block ends, however it ends.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.precedence import ENVIRONMENT as STACK_ENVIRONMENT
from kvkeep.stack.precedence import load_spec, make_spec
from kvkeep.stack.progress import Progress
from kvkeep.stack.record import StackRecord, read_record
from kvkeep.stack.spec import EngineSpec, StackSpec
from kvkeep.stack.supervisor import Stack
from kvkeep.validate.settings import ENVIRONMENT, CheckSettings
from kvkeep.validate.subject import SMALL_ENGINE_BLOCKS_MAX, Addresses

OWN_STACK_NAME = "check"
SPEC_FIELDS = {
    "model_id": "model",
    "server_port": "engines.0.port",
    "server_start_timeout_s": "start_timeout_s",
    "cpu_blocks": "daemon.pool_blocks",
}
"""Fields of the stack file by the check's setting that shapes them."""


@dataclass(frozen=True, slots=True)
class Started:
    """A stack that is ready."""

    addresses: Addresses
    restart: Callable[[], Awaitable[None]] | None
    """Restarts the engine under test; None where the stack is somebody else's."""


def spec_from_file(path: Path, flags: Mapping[str, Any], *, exact: bool | None) -> StackSpec:
    """Read a stack file; the environment is heard there too, and flags win.

    Args:
        path: The stack file.
        flags: The check's own, by setting; those that shape no stack are ignored.
        exact: What the flag says, or None to leave it to the file.

    Raises:
        InputError: Something in the file or a flag is wrong.
    """
    overrides = {field: flags.get(name) for name, field in SPEC_FIELDS.items()}
    return load_spec(path, {**overrides, "exact": exact})


def own_spec(settings: CheckSettings, environ: Mapping[str, str], *, exact: bool) -> StackSpec:
    """One engine and a daemon, for a check that was told of no stack.

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
    if settings.model_id is not None:
        values["model"] = settings.model_id
    if settings.cpu_blocks is not None:
        values["daemon"]["pool_blocks"] = settings.cpu_blocks
    # What the settings have settled already must not be overruled by the environment.
    settled = STACK_ENVIRONMENT.keys() & ENVIRONMENT.keys()
    rest = {name: value for name, value in environ.items() if name not in settled}
    return make_spec(values, environment=rest)


@contextmanager
def started(spec: StackSpec, *, quiet: bool = False) -> Iterator[Started]:
    """Use the stack of this name if it is up, else start it and stop it at the end.

    Raises:
        InputError: It can't run here, or did not start: there is nothing to check.
    """
    record = read_record(spec.state_path)
    if record is not None and record.state == "ready" and record.supervisor.is_alive():
        yield Started(_addresses(spec, _urls_of(record), _daemon_of(record)), None)
        return
    stack = Stack(_without_router(spec), progress=Progress(quiet=quiet))
    try:
        stack.start()
    except UnavailableError as error:
        raise InputError(str(error)) from error
    try:
        yield _started(spec, stack)
    finally:
        stack.stop()


def _without_router(spec: StackSpec) -> StackSpec:
    """A check asks the engines themselves, so all of them run from its start."""
    engines = [msgspec.structs.replace(engine, on_demand=False) for engine in spec.engines]
    return msgspec.structs.replace(spec, engines=engines, router=None)


def _started(spec: StackSpec, stack: Stack) -> Started:
    urls = {name: engine.url for name, engine in stack.engines.items()}
    metrics_url = stack.daemon.metrics_url if stack.has_daemon else None
    engine = stack.engines[_big_engines(spec)[0].name]

    async def restart() -> None:
        await asyncio.to_thread(engine.restart)

    addresses = _addresses(spec, urls, metrics_url)
    return Started(addresses, restart if engine.process is not None else None)


def _urls_of(record: StackRecord) -> dict[str, str]:
    return {engine.name: engine.url for engine in record.engines}


def _daemon_of(record: StackRecord) -> str | None:
    return record.daemon.metrics_url if record.daemon is not None else None


def _is_small(engine: EngineSpec) -> bool:
    return (engine.num_gpu_blocks_override or SMALL_ENGINE_BLOCKS_MAX + 1) <= (
        SMALL_ENGINE_BLOCKS_MAX
    )


def _big_engines(spec: StackSpec) -> list[EngineSpec]:
    """Engines that the suite itself may run on: all, where all are small.

    Those that may not run, in a stack that is up already, come last.
    """
    engines = sorted(spec.engines, key=lambda engine: engine.on_demand)
    return [engine for engine in engines if not _is_small(engine)] or engines


def _addresses(spec: StackSpec, urls: Mapping[str, str], daemon_url: str | None) -> Addresses:
    """Give the engines their parts: the first big one is tested, the next is the other."""
    big = [urls[engine.name] for engine in _big_engines(spec)]
    small = [urls[engine.name] for engine in spec.engines if _is_small(engine)]
    return Addresses(
        big[0],
        daemon_url or None,
        big[1] if len(big) > 1 else None,
        small[0] if small else None,
    )
