"""A whole stack: started in order, watched, stopped in reverse order; nothing outlives it.

    with Stack(load_spec("stack.yaml")) as stack:
        httpx.post(f"{stack.engines['a'].url}/v1/completions", ...)

Blocking; one thread at a time may use a stack. It sets no signal handlers: whoever runs it turns
a signal into an exception, and the ``with`` block does the rest. If this process is killed
outright, the reapers see it and end what they watch.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from kvkeep.model.errors import InputError, KvkeepError, UnavailableError
from kvkeep.router.events.settings import EngineEvents
from kvkeep.stack.engines import Launch, Placement, launch_daemon, launch_engine, launch_router
from kvkeep.stack.machine import (
    HOST,
    assigned_cores,
    assigned_gpus,
    check_machine,
    check_shapes,
    has_gpu,
    size_pool,
)
from kvkeep.stack.models import Model, check_model, resolve_model
from kvkeep.stack.parts import DaemonPart, EnginePart, Part, Restartable, await_ready
from kvkeep.stack.process import ProcessId, StackProcess, this_process
from kvkeep.stack.progress import Progress
from kvkeep.stack.record import (
    DaemonRecord,
    EngineRecord,
    FolderLock,
    ProcessRecord,
    RouterRecord,
    StackRecord,
    State,
    clear,
    clear_recorded,
    note_folder,
    write_record,
)
from kvkeep.stack.routing.on_demand import OnDemandEngines
from kvkeep.stack.routing.part import RouterPart
from kvkeep.stack.routing.running import check_values
from kvkeep.stack.routing.spec import RouterSpec, router_values
from kvkeep.stack.servers.named_part import NamedServerPart
from kvkeep.stack.servers.part import ServerPart
from kvkeep.stack.servers.ports import HeldPorts
from kvkeep.stack.servers.starting import (
    check_programs,
    make_named_servers,
    make_tier_servers,
    with_chosen_ports,
)
from kvkeep.stack.spec import EngineSpec, StackSpec, named_ports, with_whole_paths

Launcher = Callable[[EngineSpec, Placement], Launch]


class Stack:
    """One running stack; a context manager that is used once.

    ``engines`` holds the engines by name, in the order of the file, ``servers`` what the tiers made
    the stack start, ``named_servers`` what its file did. What an object store keeps stays, as do
    logs. What else `stop` removes: every process, the socket, the record, and its own pool unless
    ``daemon.keep_pool``.
    """

    def __init__(
        self,
        spec: StackSpec,
        *,
        state_dir: Path | None = None,
        progress: Progress | None = None,
        launcher: Launcher = launch_engine,
    ) -> None:
        """Prepare a stack; nothing is checked or started yet.

        Args:
            spec: From `kvkeep.stack.precedence.load_spec`.
            state_dir: Folder for logs and state instead of the spec's.
            progress: Where to show how far the start is; silent without.
            launcher: Makes an engine's command line; for engines kvkeep does not know.
        """
        folder = (state_dir or spec.state_path).expanduser().resolve()
        self.spec = with_whole_paths(msgspec.structs.replace(spec, state_dir=str(folder)))
        self.folder = folder
        self.engines: dict[str, EnginePart] = {}
        self.servers: list[ServerPart] = []
        self.named_servers: list[NamedServerPart] = []
        self.on_demand: OnDemandEngines | None = None
        """Engines that the router has started, and that whoever watches the stack has to see to."""
        self._router: RouterPart | None = None
        self._daemon: DaemonPart | None = None
        self._is_pool_made = False
        self._progress = progress or Progress(quiet=True)
        self._launcher = launcher
        self._ports = HeldPorts(named_ports(spec).values())
        self._lock: FolderLock | None = None
        self._events: dict[str, EngineEvents] = {}
        self._state: State = "starting"
        self._error = ""
        self._doing: dict[str, str] = {}

    @property
    def daemon(self) -> DaemonPart:
        """The stack's daemon.

        Raises:
            InputError: The stack has none of its own.
        """
        if self._daemon is None:
            raise InputError(
                f"The stack {self.spec.name} has no daemon of its own: set daemon.enabled: true."
            )
        return self._daemon

    @property
    def has_daemon(self) -> bool:
        """Whether `daemon` may be asked for."""
        return self._daemon is not None

    @property
    def router(self) -> RouterPart:
        """The stack's router.

        Raises:
            InputError: The stack has none.
        """
        if self._router is None:
            raise InputError(f"The stack {self.spec.name} has no router: write a section router.")
        return self._router

    @property
    def has_router(self) -> bool:
        """Whether `router` may be asked for."""
        return self._router is not None

    @property
    def model_name(self) -> str:
        """What clients send as ``model``."""
        return self.spec.model_name

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the daemon, then all engines at once, and return when each gave a token.

        Raises:
            InputError: The stack can't run on this machine, or runs already; nothing was changed.
            UnavailableError: Something did not start; everything is stopped again, the logs and a
                record that says why stay.
        """
        assert self._lock is None, "a stack is started once"
        self._lock = FolderLock.taken(self.folder)
        try:
            self._start()
        except BaseException as error:
            # Also Ctrl-C and SIGTERM: a half-started stack is stopped before anything else.
            reason = str(error) if isinstance(error, KvkeepError) else "It was interrupted."
            self.fail(reason)
            raise

    def _start(self) -> None:
        clear(self.folder)
        self._write()
        note_folder(self.spec.name, self.folder)
        for name in self.spec.models:
            check_model(name)
        models: dict[str, Model] = {}
        if any(engine.url is None for engine in self.spec.engines):
            models = self._resolve_models()
            check_shapes(self.spec, models)
            self.spec = size_pool(self.spec, next(iter(models.values())))
        check_machine(self.spec)
        check_programs(self.spec)
        with self._progress:
            self._start_servers()
            if self.spec.daemon.enabled:
                self._start_daemon()
            self._start_engines(models)
            if self.spec.router is not None:
                self._start_router(self.spec.router, models)
        self._state, self._doing = "ready", {}
        self._write()

    def _resolve_models(self) -> dict[str, Model]:
        """Every model by the name that the file has for it."""
        self._say("model", "is looked for, and converted the first time")
        models = {name: resolve_model(name, progress=self._progress) for name in self.spec.models}
        self._doing.clear()
        return models

    def _start_servers(self) -> None:
        """Start what tiers and engines use; from here on the spec has all their ports."""
        self.spec = with_chosen_ports(self.spec, self._ports)
        self.servers += make_tier_servers(self.spec, self._ports, self.folder, self._write)
        self.named_servers += make_named_servers(self.spec, self._ports, self.folder, self._write)
        servers = [*self.servers, *self.named_servers]
        for part in servers:
            part.begin()
        self._await([*servers])

    def _start_daemon(self) -> None:
        folder = Path(self.spec.socket_path).parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"daemon.socket = {self.spec.socket_path}: {folder} can't be made "
                f"({error.strerror}); choose another path."
            ) from error
        self._is_pool_made = not os.path.lexists(self.spec.daemon_settings().pool_path)
        self._daemon = DaemonPart(
            self._launch_daemon,
            self.folder,
            start_timeout_s=self.spec.start_timeout_s,
            changed=self._write,
        )
        self._daemon.begin()
        self._await([self._daemon])

    def _launch_daemon(self, metrics_port: int | None) -> Launch:
        more: dict[str, str] = {}
        for part in self.servers:
            more |= part.how.daemon_environment
        return launch_daemon(self.spec, metrics_port=metrics_port, more_environment=more)

    def _start_engines(self, models: dict[str, Model]) -> None:
        """Start all but those on demand, and wait for them."""
        gpus, cores = assigned_gpus(self.spec), assigned_cores(self.spec)
        for engine in self.spec.engines:
            placement = None
            if engine.url is None:
                placement = Placement(
                    spec=self.spec,
                    model=models[self.spec.model_of(engine)],
                    port=engine.port or self._ports.take(),
                    socket=self.spec.socket_path if engine.uses_kvkeep else "",
                    gpu=has_gpu(),
                    gpus=gpus.get(engine.name, ()),
                    cores=cores.get(engine.name),
                    side_channel_port=self._ports.take() if engine.connector == "nixl" else 0,
                    events=self._place_events(engine),
                )
            self.engines[engine.name] = self._make_engine(engine, placement)
        started = [self.engines[each.name] for each in self.spec.engines if not each.on_demand]
        for part in started:
            part.begin()
        longest_s = [engine.start_timeout_s or 0.0 for engine in self.spec.engines]
        self._await([*started], max(self.spec.start_timeout_s, *longest_s))

    def _place_events(self, engine: EngineSpec) -> EngineEvents | None:
        if self.spec.router is None or not self.spec.router.events:
            return None
        ranks = engine.num_data_parallel
        publish, replay = (f"tcp://{HOST}:{self._ports.take(ranks)}" for _ in range(2))
        self._events[engine.name] = EngineEvents(
            publish=publish, replay=replay, bind=True, pool=self.spec.pool_of(engine), ranks=ranks
        )
        return self._events[engine.name]

    def _start_router(self, router: RouterSpec, models: dict[str, Model]) -> None:
        """Start the router, and listen to what it wants started."""
        on_demand = [self.engines[each.name] for each in self.spec.engines if each.on_demand]
        if on_demand:
            self.on_demand = OnDemandEngines(self.spec.on_demand_socket_path, on_demand)
        more: dict[str, object] = {
            "port": router.port or self._ports.take(),
            "admin_port": router.admin_port or self._ports.take(),
        }
        if self._events:
            more["tokenizer"] = next(iter(models.values())).location
            more["block_tokens"] = self.spec.engines[0].block_tokens
        urls = {name: part.url for name, part in self.engines.items()}
        values = router_values(self.spec, urls, more, self._events)
        check_values(values)
        self._router = RouterPart(
            lambda: launch_router(values),
            self.folder,
            num_engines=len(self.engines) - len(on_demand),
            drain_s=router.drain_s,
            start_timeout_s=self.spec.start_timeout_s,
            changed=self._write,
        )
        self._router.begin()
        self._await([self._router])

    def _make_engine(self, engine: EngineSpec, placement: Placement | None) -> EnginePart:
        part = EnginePart(
            engine.name,
            engine.url or f"http://{HOST}:{0 if placement is None else placement.port}",
            model=None if engine.url else self.spec.served_name_of(engine),
            start_timeout_s=engine.start_timeout_s or self.spec.start_timeout_s,
            changed=self._write,
        )
        if placement is not None:
            part.will_start(lambda: self._launch_engine(engine, placement), self.folder)
        return part

    def _launch_engine(self, engine: EngineSpec, placement: Placement) -> Launch:
        launch = self._launcher(engine, placement)
        if not launch.shares_port:
            self._ports.let_go(placement.port)
        return launch

    def _await(self, parts: list[Part], timeout_s: float | None = None) -> None:
        await_ready(parts, timeout_s or self.spec.start_timeout_s, self._progress, self._say)

    def _say(self, name: str, doing: str) -> None:
        self._doing[name] = doing
        self._write()

    def ended(self) -> list[Part]:
        """Find the parts whose process ended without having been told to.

        Engines on demand are not among them: those see to themselves.
        """
        others = frozenset() if self.on_demand is None else self.on_demand.names
        return [
            part
            for part in self._parts()
            if part.name not in others or part is not self.engines.get(part.name)
            if part.process is not None and not part.process.is_running()
        ]

    @property
    def restartable(self) -> list[Restartable]:
        """Parts that may be started again alone; engines, where a router goes around them."""
        daemon = [self._daemon] if self._daemon else []
        found: list[Restartable] = [*self.servers, *self.named_servers, *daemon]
        if self._router is not None:
            found += [
                self.engines[engine.name]
                for engine in self.spec.engines
                if engine.url is None and not engine.on_demand
            ]
            found.append(self._router)
        return found

    def _parts(self) -> list[Part]:
        """Everything that was made, in the order of the start."""
        daemon = [self._daemon] if self._daemon else []
        router = [self._router] if self._router else []
        servers: list[Part] = [*self.servers, *self.named_servers]
        return [*servers, *daemon, *self.engines.values(), *router]

    def stop(self) -> None:
        """Stop everything in reverse order of the start. Idempotent.

        It needs nothing of the state folder, which may be gone or full.
        """
        if self._lock is None:
            return
        self._state = "stopping"
        self._write()
        self._end_processes()
        clear_recorded(self.folder, self.record())
        self._unlock()

    def fail(self, reason: str) -> None:
        """Stop everything, and leave a record that says why. Does nothing after a stop."""
        if self._lock is None:
            return
        self._end_processes()
        clear(self.folder)  # also what an earlier stack left, if it came to nothing more
        clear_recorded(self.folder, self.record())
        self._state, self._error, self._doing = "failed", reason, {}
        self._daemon, self.engines, self.servers, self._router = None, {}, [], None
        self.named_servers = []
        self._write()
        self._unlock()

    def _end_processes(self) -> None:
        """The router lets what runs come to its end, then all engines go, then what they use."""
        if self._router is not None:
            self._router.stop()
        if self.on_demand is not None:
            self.on_demand.close()
            self.on_demand = None
        engines = [p.process for p in reversed(self.engines.values()) if p.process is not None]
        for process in engines:
            process.ask_stop()
        for process in engines:
            process.stop()
        if self._daemon is not None:
            self._daemon.stop()
        for named in self.named_servers:
            named.end()
        for server in self.servers:
            server.end()

    def _unlock(self) -> None:
        self._ports.let_all_go()
        if self._lock is not None:
            self._lock.give_back()
            self._lock = None

    def _write(self) -> None:
        """Write down what is; a stack that is up goes on where that fails.

        Raises:
            UnavailableError: It starts, and nobody could find what it started.
        """
        try:
            write_record(self.folder, self.record())
        except OSError as error:
            if self._state == "starting":
                raise UnavailableError(
                    f"{self.folder} can't be written ({error.strerror}): "
                    "make room, or choose another state_dir."
                ) from error

    def record(self) -> StackRecord:
        """The stack as it is now, as it is written down."""
        return StackRecord(
            name=self.spec.name,
            state=self._state,
            supervisor=this_process(),
            model=self.spec.model_name,
            error=self._error,
            doing=dict(self._doing),
            daemon=self._daemon_record(),
            engines=[
                _engine_record(self.spec, engine, self.engines[engine.name])
                for engine in self.spec.engines
                if engine.name in self.engines
            ],
            router=self._router_record(),
            drain_s=0.0 if self.spec.router is None else self.spec.router.drain_s,
            processes=[
                entry for part in self._parts() if (entry := _process_record(part)) is not None
            ],
            sockets=[str(path) for server in self.servers for path in server.how.leftovers()],
        )

    def _router_record(self) -> RouterRecord | None:
        router = self._router
        if router is None:
            return None
        if not router.was_ready:
            return RouterRecord(url="", admin_url="")
        return RouterRecord(url=router.url, admin_url=router.admin_url)

    def _daemon_record(self) -> DaemonRecord | None:
        if self._daemon is None:
            return None
        was_ready = self._daemon.was_ready
        return DaemonRecord(
            socket=self._daemon.socket if was_ready else "",
            metrics_url=self._daemon.metrics_url if was_ready else "",
            pool=self._own_pool(self._daemon),
            keep_pool=self.spec.daemon.keep_pool,
        )

    def _own_pool(self, daemon: DaemonPart) -> str:
        """Path of the pool that goes with the stack; empty where it is not the stack's.

        Its own is one that was not there before, and one that its daemon took over under the name
        that follows from the stack's folder: that name no other daemon uses. Any other pool that
        was there may have been left by a daemon for its next start.
        """
        settings = self.spec.daemon_settings()
        is_named_after_folder = not self.spec.daemon.socket and not settings.pool
        if self._is_pool_made or (is_named_after_folder and daemon.was_ready):
            return str(settings.pool_path)
        return ""


def _engine_record(spec: StackSpec, engine: EngineSpec, part: EnginePart) -> EngineRecord:
    name = spec.served_name_of(engine)
    return EngineRecord(
        name=part.name,
        url=part.url,
        pid=_pid(part.process),
        model="" if name == spec.model_name else name,
        on_demand=engine.on_demand,
    )


def _pid(process: StackProcess | None) -> int | None:
    return process.id.pid if process is not None and process.id is not None else None


def _process_record(part: Part) -> ProcessRecord | None:
    process = part.process
    if process is None or process.id is None:
        return None
    reaper = process.reaper_id or ProcessId(0, 0)
    return ProcessRecord(name=part.title, process=process.id, reaper=reaper, log=str(process.log))
